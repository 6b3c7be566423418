"""A decoder block's second half: an MLP, or a mixture of experts.

B  rows    T  positions    D  hidden width    I  width inside an MLP    E  experts
"""

from typing import Any

import jax
import jax.numpy as jnp
import keras

from kithara_ray.model import keras_compat
from kithara_ray.model.decoder.description import Experts, Mlp
from kithara_ray.model.decoder.layers import DecoderActivation


class DecoderMlp(keras.layers.Layer):
    """An MLP of (B, T, D): gated, plain, or with gate and up projection in one module."""

    def __init__(self, mlp: Mlp, hidden: int, **kwargs):
        super().__init__(**kwargs)
        self.mlp, self.hidden = mlp, hidden
        self.gate = None

    def build(self, input_shape):
        given = self.mlp
        own: dict[str, Any] = {"dtype": self.dtype_policy}
        self.up = keras.layers.Dense(given.width * (1 + given.is_fused), use_bias=given.bias, name=given.up, **own)
        self.up.build(input_shape)
        if given.gate is not None and not given.is_fused:
            self.gate = keras.layers.Dense(given.width, use_bias=given.bias, name=given.gate, **own)
            self.gate.build(input_shape)
        inner = (*input_shape[:-1], given.width)
        self.activation = DecoderActivation(given.activation, name="act_fn", **own)
        self.activation.build(inner)
        self.down = keras.layers.Dense(self.hidden, use_bias=given.bias, name=given.down, **own)
        self.down.build(inner)
        self.built = True

    def call(self, x):
        if self.mlp.is_fused:
            gate, up = jnp.split(self.up(x), 2, axis=-1)
            return self.down(self.activation(gate) * up)
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, self.compute_dtype)


class DecoderExperts(keras.layers.Layer):
    """A mixture of experts of (B, T, D); the router computes in float32, as in transformers.

    Every expert computes every token, as in KerasHub's mixtures, and the scores weigh the results, most of them by 0.
    """

    def __init__(self, experts: Experts, hidden: int, **kwargs):
        super().__init__(**kwargs)
        self.experts, self.hidden = experts, hidden
        self.shared = None

    def build(self, input_shape):
        given = self.experts
        shapes = {
            "router": (self.hidden, given.count),
            "correction": given.correction_shape,
            "gate": (given.count, self.hidden, given.width),
            "up": (given.count, self.hidden, given.width),
            "down": (given.count, given.width, self.hidden),
        }
        for name, shape in shapes.items():
            setattr(self, name, self.add_weight(name=name, shape=shape, initializer="zeros"))
        own: dict[str, Any] = {"dtype": self.dtype_policy}
        self.activation = DecoderActivation(given.activation, name="act_fn", **own)
        self.activation.build((*input_shape[:-1], given.width))
        if given.shared is not None:
            self.shared = DecoderMlp(given.shared, self.hidden, name="shared_experts", **own)
            self.shared.build(input_shape)
        self.built = True

    def call(self, x):
        weights_BTE = self._weights(x).astype(x.dtype)
        gate, up = (jnp.einsum("btd,edi->btei", x, jnp.asarray(kernel)) for kernel in (self.gate, self.up))
        inner = self.activation(gate) * up * weights_BTE[..., None]
        out = jnp.einsum("btei,eid->btd", inner, jnp.asarray(self.down))
        return out if self.shared is None else out + self.shared(x)

    def _weights(self, x) -> jax.Array:
        """The factor of each expert's result, (B, T, E) float32: 0 for those that are not chosen."""
        given = self.experts
        with keras_compat.without_autocast():
            router, correction = (jnp.asarray(v.value, jnp.float32) for v in (self.router, self.correction))
        logits = jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
        scores = jax.nn.softmax(logits, axis=-1) if given.scores == "softmax" else jax.nn.sigmoid(logits)
        _, chosen = jax.lax.top_k(scores + correction.reshape(-1), given.chosen)
        kept = scores * jax.nn.one_hot(chosen, given.count, dtype=jnp.float32).sum(axis=-2)
        if given.normalised:
            kept = kept / jnp.maximum(kept.sum(axis=-1, keepdims=True), given.floor)
        return kept * given.factor

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, self.compute_dtype)


def mlp_layer(mlp: Mlp | Experts, hidden: int, **kwargs: Any) -> DecoderMlp | DecoderExperts:
    """Make the layer that a description means."""
    return DecoderMlp(mlp, hidden, **kwargs) if isinstance(mlp, Mlp) else DecoderExperts(mlp, hidden, **kwargs)
