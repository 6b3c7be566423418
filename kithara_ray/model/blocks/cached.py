"""Attention over keys and values that are kept while a decoder block decodes.

    B  rows    P  positions of a prompt    S  positions of the cache    N  query heads    K  key and value heads
    G = N // K    H  head width

A row's token at position p is kept at place p of the cache, so rows of different lengths share a batch without padding
before their prompts. `decoding` puts this attention in the place of the one that `blocks.attention` installs.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
import keras

from kithara_ray.model import keras_compat
from kithara_ray.model.blocks import attention

_HOW: ContextVar["Prompts | Step | None"] = ContextVar("how blocks decode", default=None)


class Cache(NamedTuple):
    """One block's keys and values, each (B, K, S, H); the keys are rotated."""

    keys: jax.Array
    values: jax.Array


class Prompts:
    """Attention within prompts, which begin at position 0.

    Attributes:
        length: the number of tokens that a row may have at the end, a scalar.
        cache: afterwards, the keys and values of the prompts, (B, K, P, H).
    """

    positions = None

    def __init__(self, length: jax.Array):
        self.length = length

    def attend(self, q_BPNH, k_BPKH, v_BPKH, segments_BP, settings: attention.Settings, sinks_N=None) -> jax.Array:
        """See `attention.xla_attention`."""
        self.cache = Cache(jnp.swapaxes(k_BPKH, 1, 2), jnp.swapaxes(v_BPKH, 1, 2))
        return attention.xla_attention(q_BPNH, k_BPKH, v_BPKH, segments_BP, settings, sinks_N)


class Step:
    """Attention of one token a row over a cache.

    Attributes:
        length: the number of tokens that a row may have at the end, a scalar.
        positions: the tokens' positions, (B,).
        cache: afterwards, the cache with the tokens' own keys and values in it.
    """

    def __init__(self, length: jax.Array, cache: Cache, positions: jax.Array):
        self.length, self.cache, self.positions = length, cache, positions

    def attend(self, q_B1NH, k_B1KH, v_B1KH, segments_B1, settings: attention.Settings, sinks_N=None) -> jax.Array:
        """See `attention.xla_attention`; the logits and the softmax are float32."""
        b, _, n, h = q_B1NH.shape
        kept = (_put(into, new, self.positions) for into, new in zip(self.cache, (k_B1KH, v_B1KH), strict=True))
        self.cache = Cache(*kept)
        keys_BKSH, values_BKSH = self.cache
        kv, places = keys_BKSH.shape[1:3]
        distance_BS = self.positions[:, None] - jnp.arange(places)[None, :]
        seen_BS = distance_BS >= 0
        if settings.window is not None:
            seen_BS &= distance_BS < settings.window
        q_BKGH = q_B1NH.reshape(b, kv, n // kv, h)
        logits_BKGS = jnp.einsum("bkgh,bksh->bkgs", q_BKGH, keys_BKSH, preferred_element_type=jnp.float32)
        logits_BKG1S = logits_BKGS[..., None, :] * settings.scale
        weights = attention.softmax(logits_BKG1S, seen_BS[:, None], settings.soft_cap, sinks_N)[..., 0, :]
        out_BKGH = jnp.einsum("bkgs,bksh->bkgh", weights.astype(values_BKSH.dtype), values_BKSH)
        return out_BKGH.reshape(b, 1, n, h)


def _put(into_BKSH: jax.Array, new_B1KH: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Write each row's token at its position."""

    def row(into_KSH, new_1KH, position):
        new_K1H = jnp.swapaxes(new_1KH, 0, 1).astype(into_KSH.dtype)
        return jax.lax.dynamic_update_slice(into_KSH, new_K1H, (0, position, 0))

    return jax.vmap(row)(into_BKSH, new_B1KH, positions_B)


@contextlib.contextmanager
def decoding(how: Prompts | Step) -> Iterator[None]:
    """Compute the attention of blocks by `how`, at its positions, inside this context."""
    token = _HOW.set(how)
    try:
        with attention.computed_by(how.attend):
            yield
    finally:
        _HOW.reset(token)


def positions_of(tokens: int) -> tuple[jax.Array, jax.Array] | None:
    """The positions, (T,) or (B, 1), and the length, (1, 1), of the tokens that are decoded; None while none are."""
    if (how := _HOW.get()) is None:
        return None
    positions = jnp.arange(tokens) if how.positions is None else how.positions[:, None]
    return positions, how.length.reshape(1, 1)


def rotate_at_positions(blocks: Iterable[keras.layers.Layer]) -> None:
    """Make KerasHub's rotations in these blocks rotate a `Step`'s tokens by their own positions."""
    for block in blocks:
        for layer in keras_compat.all_layers(block):
            if "RotaryEmbedding" in type(layer).__name__:
                layer.call = _by_rows(layer.call)


def _by_rows(rotate: Callable) -> Callable:
    def call(inputs, start_index=0, **kwargs):
        how = _HOW.get()
        if how is None or how.positions is None:
            return rotate(inputs, start_index=start_index, **kwargs)
        by_row = jax.vmap(lambda row, position: rotate(row[None], start_index=position))(inputs, how.positions)
        return jax.tree.map(lambda array: array[:, 0], by_row)

    return call
