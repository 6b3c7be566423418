"""Dropout of what LoRA's side paths are given, as torch's: PEFT drops nothing else."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp

# The key of the pass that is being traced; None where nothing is dropped, as in evaluation.
_KEY: ContextVar[jax.Array | None] = ContextVar("dropout key", default=None)


@contextlib.contextmanager
def dropping(key: jax.Array | None) -> Iterator[None]:
    """Inside, `dropped` drops by this key."""
    token = _KEY.set(key)
    try:
        yield
    finally:
        _KEY.reset(token)


def dropped(x: jax.Array, rate: float, number: int) -> jax.Array:
    """`x` with a share `rate` of its elements zero and the others scaled by 1 / (1 - rate), so that its mean stays.

    Args:
        number: of the layer; layers of one pass drop different elements.
    """
    key = _KEY.get()
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
