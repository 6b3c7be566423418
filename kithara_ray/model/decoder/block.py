"""One decoder block for every family of ours, described by values.

    B  rows    T  positions    D  hidden width    N  query heads    K  key and value heads    G = N // K
    H  head width    Q  positions of this call    S  positions of the cache

Linear layers are Keras' Dense and EinsumDense, so LoRA, int8 and sharding treat them as KerasHub's. A module that
projects to queries, keys and values at once stays one layer: PEFT adapts the whole, with one A and one B.
"""

from typing import Any

import jax
import jax.numpy as jnp
import keras

from kithara_ray.model.blocks.attention import Settings, attend_locally
from kithara_ray.model.decoder.description import Attention, Block
from kithara_ray.model.decoder.layers import DecoderNorm, grown, rotated, sample_lengths, sample_positions
from kithara_ray.model.decoder.mlp import mlp_layer

_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


class DecoderAttention(keras.layers.Layer):
    """Attention of (B, T, D), within segments, or over a cache (B, 2, S, K, H) of keys and values.

    Attributes:
        settings: scale and window.
        attend: computes (B, T, N, H) from queries, keys, values, segment ids and settings; `blocks.attention` sets it.
    """

    def __init__(self, attention: Attention, hidden: int, **kwargs):
        super().__init__(**kwargs)
        self.attention, self.hidden = attention, hidden
        self.settings = Settings(attention.scale, attention.window)
        self.attend = attend_locally
        # Plain values, by which the scan tells whether blocks are alike.
        self.described = repr(attention)

    def build(self, input_shape):
        given = self.attention
        own: dict[str, Any] = {"dtype": self.dtype_policy}
        heads = {"q_proj": given.heads, "k_proj": given.key_heads, "v_proj": given.key_heads}
        if given.fused is None:
            for name, count in heads.items():
                layer = _to_heads(count, given.head_dim, given.bias, name=name, **own)
                layer.build(input_shape)
                setattr(self, name, layer)
        else:
            self.fused = keras.layers.Dense(
                sum(heads.values()) * given.head_dim, use_bias=given.bias, name=given.fused, **own
            )
            self.fused.build(input_shape)
        self.out = keras.layers.EinsumDense(
            "btnh,nhd->btd", (None, self.hidden), bias_axes="d" if given.out_bias else None, name=given.out_name, **own
        )
        self.out.build((*input_shape[:-1], given.heads, given.head_dim))
        if given.norm is not None:
            for name, count in (("query_norm", given.heads), ("key_norm", given.key_heads)):
                norm = DecoderNorm(given.norm, name=name, **own)
                norm.build((count * given.head_dim if given.norm_whole else given.head_dim,))
                setattr(self, name, norm)
        self.built = True

    def call(self, x, segments: Any = None, cache=None, index=0):
        query, key, value = self._projected(x)
        positions_T = index + jnp.arange(query.shape[1])
        if cache is None:
            positions = sample_positions(segments) if self.attention.is_placed else positions_T
            query, key = self._turned(query, key, positions, segments)
            return self.out(self.attend(query, key, value, segments, self.settings))
        query, key = self._turned(query, key, positions_T, jnp.ones((1, cache.shape[2]), jnp.int32))
        start = (0, index, 0, 0)
        keys, values = (
            jax.lax.dynamic_update_slice(cache[:, at], new.astype(cache.dtype), start)
            for at, new in enumerate((key, value))
        )
        attended = _over_cache(query, keys, values, index, self.settings)
        return self.out(attended), jnp.stack([keys, values], axis=1)

    def compute_output_spec(self, x, segments=None, cache=None, index=0):
        return keras.KerasTensor(x.shape, self.compute_dtype)

    def _projected(self, x) -> list[jax.Array]:
        given = self.attention
        if given.fused is None:
            return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        joint = self.fused(x)
        ends = (given.heads * given.head_dim, (given.heads + given.key_heads) * given.head_dim)
        return [part.reshape(*part.shape[:-1], -1, given.head_dim) for part in jnp.split(joint, ends, axis=-1)]

    def _turned(self, query, key, positions, segments) -> list[jax.Array]:
        """Normalise, rotate and scale queries and keys at these positions, (T,) or (B, T)."""
        given = self.attention
        both = [query, key]
        if given.norm is not None and not given.norm_after_rotation:
            both = self._normed(both)
        if given.rotation is not None:
            lengths = sample_lengths(segments)[:, : query.shape[1]] if given.rotation.limit is not None else segments
            both = [rotated(array, positions, given.rotation, lengths) for array in both]
        if given.growth is not None:
            both = [grown(both[0], positions, *given.growth), both[1]]
        return self._normed(both) if given.norm is not None and given.norm_after_rotation else both

    def _normed(self, both) -> list[jax.Array]:
        norms = (self.query_norm, self.key_norm)
        if not self.attention.norm_whole:
            return [norm(array) for norm, array in zip(norms, both, strict=True)]
        wholes = [array.reshape(*array.shape[:2], -1) for array in both]
        return [norm(whole).reshape(a.shape) for norm, whole, a in zip(norms, wholes, both, strict=True)]


def _to_heads(heads: int, width: int, bias: bool, **kwargs) -> keras.layers.EinsumDense:
    axes = "nh" if bias else None
    return keras.layers.EinsumDense("btd,dnh->btnh", (None, heads, width), bias_axes=axes, **kwargs)


def _over_cache(q_BQNH, k_BSKH, v_BSKH, index, settings: Settings) -> jax.Array:
    """Attend to the cache's positions up to each query's own; logits and softmax are float32."""
    b, q, n, h = q_BQNH.shape
    kv = k_BSKH.shape[2]
    distance = (index + jnp.arange(q))[:, None] - jnp.arange(k_BSKH.shape[1])[None, :]
    seen_QS = distance >= 0 if settings.window is None else (distance >= 0) & (distance < settings.window)
    grouped = q_BQNH.reshape(b, q, kv, n // kv, h)
    logits = jnp.einsum("bqkgh,bskh->bkgqs", grouped, k_BSKH, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(seen_QS, logits * settings.scale, _HIDDEN), axis=-1)
    return jnp.einsum("bkgqs,bskh->bqkgh", weights.astype(v_BSKH.dtype), v_BSKH).reshape(b, q, n, h)


class DecoderBlock(keras.layers.Layer):
    """One block of (B, T, D). With a cache it also returns the new cache.

    Call arguments:
        padding_mask: int (B, T), the segment ids; read only without a cache.
        cache: this block's keys and values, (B, 2, S, K, H).
        cache_update_index: position of the first token of this call.
    """

    def __init__(self, block: Block, hidden: int, **kwargs):
        super().__init__(**kwargs)
        self.block, self.hidden = block, hidden
        self.described = repr(block)
        self.norms: dict[str, DecoderNorm] = {}

    def build(self, input_shape):
        own: dict[str, Any] = {"dtype": self.dtype_policy}
        self.norms = {name: DecoderNorm(self.block.norm, name=name, **own) for name in self.block.norms}
        self.self_attn = DecoderAttention(self.block.attention, self.hidden, name="self_attn", **own)
        self.mlp = mlp_layer(self.block.mlp, self.hidden, name=self.block.mlp_name, **own)
        for layer in (*self.norms.values(), self.self_attn, self.mlp):
            layer.build(input_shape)
        self.built = True

    def call(self, x, padding_mask=None, cache=None, cache_update_index=0):
        given, new_cache = self.block, None
        normed = self._norm(given.before_attention, x)
        if cache is None:
            attended = self.self_attn(normed, segments=padding_mask)
        else:
            attended, new_cache = self.self_attn(normed, cache=cache, index=cache_update_index)
        attended = self._norm(given.after_attention, attended)
        if given.parallel:
            x = x + (attended + self._after(normed)) * given.residual
        else:
            x = x + attended * given.residual
            x = x + self._after(self._norm(given.before_mlp, x)) * given.residual
        return x if cache is None else (x, new_cache)

    def _after(self, normed) -> Any:
        return self._norm(self.block.after_mlp, self.mlp(normed))

    def _norm(self, name: str | None, x) -> Any:
        return x if name is None else self.norms[name](x)

    def compute_output_spec(self, x, padding_mask=None, cache=None, cache_update_index=0):
        return keras.KerasTensor(x.shape, self.compute_dtype)
