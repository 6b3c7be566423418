"""One decoder block for every family of ours, described by values.

    B  rows    T  positions    D  hidden width    N  query heads    K  key and value heads    H  head width

Linear layers are Keras' Dense and EinsumDense, so LoRA, int8 and sharding treat them as KerasHub's. A module that
projects to queries, keys and values at once stays one layer: PEFT adapts the whole, with one A and one B.
"""

from typing import Any

import jax
import jax.numpy as jnp
import keras

from kithara_ray.model.blocks.attention import Settings, attend_locally
from kithara_ray.model.blocks.cached import positions_of
from kithara_ray.model.decoder.description import Attention, Block
from kithara_ray.model.decoder.layers import DecoderNorm, grown, rotated, sample_lengths, sample_positions
from kithara_ray.model.decoder.mlp import mlp_layer


class DecoderAttention(keras.layers.Layer):
    """Attention of (B, T, D), within segments.

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

    def call(self, x, segments: Any = None):
        query, key, value = self._projected(x)
        positions, lengths = positions_of(query.shape[1]) or self._places(segments)
        query, key = self._turned(query, key, positions, lengths)
        return self.out(self.attend(query, key, value, segments, self.settings))

    def _places(self, segments_BT) -> tuple[jax.Array, jax.Array | None]:
        """Positions, (T,) or (B, T), and lengths of the tokens' samples, (B, T), if the rotation depends on them."""
        given = self.attention
        by_length = given.rotation is not None and given.rotation.limit is not None
        positions = sample_positions(segments_BT) if given.is_placed else jnp.arange(segments_BT.shape[1])
        return positions, sample_lengths(segments_BT) if by_length else None

    def compute_output_spec(self, x, segments=None):
        return keras.KerasTensor(x.shape, self.compute_dtype)

    def _projected(self, x) -> list[jax.Array]:
        given = self.attention
        if given.fused is None:
            return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        joint = self.fused(x)
        ends = (given.heads * given.head_dim, (given.heads + given.key_heads) * given.head_dim)
        return [part.reshape(*part.shape[:-1], -1, given.head_dim) for part in jnp.split(joint, ends, axis=-1)]

    def _turned(self, query, key, positions, lengths) -> list[jax.Array]:
        """Normalise, rotate and scale queries and keys at these positions, (T,) or (B, T); see `layers.rotated`."""
        given = self.attention
        both = [query, key]
        if given.norm is not None and not given.norm_after_rotation:
            both = self._normed(both)
        if given.rotation is not None:
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


class DecoderBlock(keras.layers.Layer):
    """One block of (B, T, D); `padding_mask` is int (B, T), the segment ids."""

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

    def call(self, x, padding_mask=None):
        given = self.block
        normed = self._norm(given.before_attention, x)
        attended = self._norm(given.after_attention, self.self_attn(normed, segments=padding_mask))
        if given.parallel:
            return x + (attended + self._after(normed)) * given.residual
        x = x + attended * given.residual
        return x + self._after(self._norm(given.before_mlp, x)) * given.residual

    def _after(self, normed) -> Any:
        return self._norm(self.block.after_mlp, self.mlp(normed))

    def _norm(self, name: str | None, x) -> Any:
        return x if name is None else self.norms[name](x)

    def compute_output_spec(self, x, padding_mask=None):
        return keras.KerasTensor(x.shape, self.compute_dtype)
