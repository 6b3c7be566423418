"""A decoder block's second half: an MLP, or a mixture of experts.

B  rows    T  positions    D  hidden width    I  width inside an MLP    E  experts    K  experts of a token
L  rank of LoRA's factors
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras

from kithara_ray.model import keras_compat
from kithara_ray.model.blocks.experts import Choice, Compute, Kernels, dense
from kithara_ray.model.blocks.mixtures import factors_of
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

    Attributes:
        compute: computes the weighted sum of the experts; `blocks.mixtures` sets it.
    """

    def __init__(self, experts: Experts, hidden: int, **kwargs):
        super().__init__(**kwargs)
        self.experts, self.hidden = experts, hidden
        self.compute: Compute = dense
        self.shared = None
        self.lora_router_A = self.lora_router_B = None
        self.lora_router_scale = 1.0

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
        gate, up, down = (jnp.asarray(kernel) for kernel in (self.gate, self.up, self.down))
        kernels = Kernels((gate, up), down, self._inner, factors=factors_of(self, self.experts.count))
        out = self.compute(x, self._choice(x), kernels)
        return out if self.shared is None else out + self.shared(x)

    def add_router_factors(self, rank: int, scale: float) -> list[keras.Variable]:
        """Add LoRA's factors A (rank, D) and B (E, rank) of the router, and return them."""
        shapes = {"lora_router_A": (rank, self.hidden), "lora_router_B": (self.experts.count, rank)}
        with keras_compat.adding_weights(self):
            for name, shape in shapes.items():
                setattr(self, name, self.add_weight(name=name, shape=shape, dtype="float32", initializer="zeros"))
        self.lora_router_scale = scale
        return [getattr(self, name) for name in shapes]

    def _inner(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return self.activation(gate).astype(jnp.float32) * up.astype(jnp.float32)

    def _choice(self, x) -> Choice:
        given = self.experts
        with keras_compat.without_autocast():
            router, correction = (jnp.asarray(v.value, jnp.float32) for v in (self.router, self.correction))
            factors = [jnp.asarray(v.value) for v in (self.lora_router_A, self.lora_router_B) if v is not None]
        product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        logits = product(x.astype(jnp.float32), router)
        if factors:
            a_LD, b_EL = factors
            logits = logits + product(product(x.astype(jnp.float32), a_LD.T), b_EL.T) * self.lora_router_scale
        scores = jax.nn.softmax(logits, axis=-1) if given.scores == "softmax" else jax.nn.sigmoid(logits)
        _, chosen = jax.lax.top_k(scores + correction.reshape(-1), given.chosen)
        factors = jnp.take_along_axis(scores, chosen, axis=-1)
        if given.normalised:
            factors = factors / jnp.maximum(factors.sum(axis=-1, keepdims=True), given.floor)
        return Choice(chosen, factors * given.factor)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, self.compute_dtype)


def mlp_layer(mlp: Mlp | Experts, hidden: int, **kwargs: Any) -> DecoderMlp | DecoderExperts:
    """Make the layer that a description means."""
    return DecoderMlp(mlp, hidden, **kwargs) if isinstance(mlp, Mlp) else DecoderExperts(mlp, hidden, **kwargs)
