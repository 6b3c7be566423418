"""Dropout of the LoRA side paths' input, as torch computes it: PEFT drops nothing else."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp

# The key of the pass being traced; None drops nothing, as in evaluation.
_KEY: ContextVar[jax.Array | None] = ContextVar("dropout key", default=None)


@contextlib.contextmanager
def dropping(key: jax.Array | None) -> Iterator[None]:
    """Make `dropped` use this key while this context is active."""
    token = _KEY.set(key)
    try:
        yield
    finally:
        _KEY.reset(token)


def dropped(x: jax.Array, rate: float, number: int) -> jax.Array:
    """`x` with a fraction `rate` of its elements zeroed and the others scaled by 1 / (1 - rate), which keeps its mean.

    Args:
        number: the layer's number; layers of one pass drop different elements.
    """
    key = _KEY.get()
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
