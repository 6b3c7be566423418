"""The small layers of a decoder block: norms, rotation, activations.

B  rows    T  positions    N  heads    H  head width    R  rotated width    F = R // 2
"""

import jax
import jax.numpy as jnp
import keras

from kithara_ray.model.decoder.description import XIELU, Norm
from kithara_ray.model.decoder.rope import Rotation


class DecoderNorm(keras.layers.Layer):
    """A `Norm` over the last dim, computed in float32 and rounded once."""

    def __init__(self, norm: Norm, **kwargs):
        super().__init__(**kwargs)
        self.norm = norm
        self.kind, self.epsilon, self.offset = norm.kind, norm.epsilon, norm.offset
        self.bias = None

    def build(self, input_shape):
        self.scale = self.add_weight(name="scale", shape=(input_shape[-1],), initializer="ones")
        if self.norm.bias:
            self.bias = self.add_weight(name="bias", shape=(input_shape[-1],), initializer="zeros")
        self.built = True

    def call(self, x):
        wide = jnp.asarray(x, jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        wide = wide * (jnp.asarray(self.scale, jnp.float32) + self.offset)
        if self.bias is not None:
            wide = wide + jnp.asarray(self.bias, jnp.float32)
        return wide.astype(self.compute_dtype)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, self.compute_dtype)


class DecoderActivation(keras.layers.Layer):
    """An activation by transformers' name; xIELU (arXiv:2411.13010) has trained numbers of its own."""

    def __init__(self, activation: str, **kwargs):
        super().__init__(**kwargs)
        self.activation = activation
        self.numbers: list[keras.Variable] = []

    def build(self, input_shape):
        if self.activation == "xielu":
            self.numbers = [self.add_weight(name=n, shape=s, initializer="zeros") for n, s in XIELU.items()]
        self.built = True

    def call(self, x):
        if self.activation != "xielu":
            return _ACTIVATIONS[self.activation](x)
        alpha_p, alpha_n, beta, eps = (jnp.asarray(number, x.dtype) for number in self.numbers)
        positive = jax.nn.softplus(alpha_p) * x * x
        negative = (jnp.expm1(jnp.minimum(x, eps)) - x) * (beta + jax.nn.softplus(alpha_n))
        return jnp.where(x > 0, positive, negative) + beta * x

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, self.compute_dtype)


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def rotated(x_BTNH: jax.Array, positions: jax.Array, rotation: Rotation, lengths_BT: jax.Array) -> jax.Array:
    """Rotate the first R places of each head by its position, in float32.

    Args:
        positions: int, (T,) or (B, T).
        lengths_BT: int; the number of tokens of each token's sample. Read only if the rotation depends on it.
    """
    angles = positions.astype(jnp.float32)[..., None] * _frequencies(rotation, lengths_BT)
    cos, sin = (wave(angles)[..., None, :] * rotation.scale for wave in (jnp.cos, jnp.sin))
    width = 2 * angles.shape[-1]
    turned, rest = x_BTNH[..., :width].astype(jnp.float32), x_BTNH[..., width:]
    if rotation.interleaved:
        one, two = turned[..., 0::2], turned[..., 1::2]
        both = jnp.stack([one * cos - two * sin, two * cos + one * sin], axis=-1).reshape(turned.shape)
    else:
        one, two = jnp.split(turned, 2, axis=-1)
        both = jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
    return jnp.concatenate([both.astype(x_BTNH.dtype), rest], axis=-1)


def grown(query_BTNH: jax.Array, positions: jax.Array, beta: float, length: int) -> jax.Array:
    """Multiply queries by 1 + beta * log(1 + p // length) of their positions p, (T,) or (B, T), in float32."""
    factor = 1 + beta * jnp.log1p((positions // length).astype(jnp.float32))
    return (query_BTNH.astype(jnp.float32) * factor[..., None, None]).astype(query_BTNH.dtype)


def _frequencies(rotation: Rotation, lengths_BT: jax.Array) -> jax.Array:
    """Frequencies (F,), or (B, T, F) where they depend on the sample's length."""
    plain = jnp.asarray(rotation.frequencies, jnp.float32)
    if rotation.limit is None:
        return plain
    is_longer = (lengths_BT > rotation.limit)[..., None]
    if rotation.longer is not None:
        return jnp.where(is_longer, jnp.asarray(rotation.longer, jnp.float32), plain)
    width = 2 * len(rotation.frequencies)
    lengths = jnp.maximum(lengths_BT, rotation.limit).astype(jnp.float32)[..., None]
    stretched = rotation.factor * lengths / rotation.limit - (rotation.factor - 1)
    base = rotation.base * stretched ** (width / (width - 2))
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    return jnp.where(is_longer, 1 / base**exponents, plain)


def sample_lengths(segments_BT: jax.Array) -> jax.Array:
    """Count the tokens of each token's own segment: (B, T), without any T x T array."""
    ids = segments_BT.astype(jnp.int32)
    rows, positions = ids.shape
    row_B1 = jnp.arange(rows)[:, None]
    counts = jnp.zeros((rows, positions + 1), jnp.int32).at[row_B1, ids].add(1)
    return counts[row_B1, ids]


def sample_positions(segments_BT: jax.Array) -> jax.Array:
    """Number each segment's tokens from 0: (B, T). A segment's tokens are neighbours."""
    ids = segments_BT.astype(jnp.int32)
    places_T = jnp.arange(ids.shape[1])
    begins = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    return places_T - jax.lax.cummax(jnp.where(begins, places_T, 0), axis=1)
