"""A decoder of ours as a KerasHub backbone and causal LM, and the tensors that feed its variables.

B  rows    T  positions    D  hidden width    L  blocks    S  positions of the cache    K, H  key heads, head width
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import keras
import keras_hub
import numpy as np

from kithara_ray.hf.tied_head import EMBEDDING, HEAD
from kithara_ray.model.decoder.block import DecoderBlock
from kithara_ray.model.decoder.description import XIELU, Description
from kithara_ray.model.decoder.layers import DecoderNorm
from kithara_ray.model.decoder.mlp import DecoderExperts, DecoderMlp

# A variable, the tensor that feeds it or those that are stacked in it, and the view of one with its part's shape.
Fed = tuple[keras.Variable, str | list[str], Callable[[np.ndarray, Any], np.ndarray]]


class DecoderEmbedding(keras.layers.ReversibleEmbedding):
    """A token embedding whose head may have a bias and a factor of its logits."""

    def __init__(self, description: Description, **kwargs):
        super().__init__(
            description.vocabulary,
            description.hidden,
            tie_weights=description.tied,
            logit_soft_cap=description.logit_soft_cap,
            **kwargs,
        )
        self.logit_scale, self.has_bias = description.logit_scale, description.head_bias
        self.head_bias = None

    def build(self, input_shape=None):
        super().build(input_shape)
        if self.has_bias:
            self.head_bias = self.add_weight(name="head_bias", shape=(self.input_dim,), initializer="zeros")

    def call(self, inputs, reverse=False):
        if not reverse:
            return super().call(inputs)
        cap, self.logit_soft_cap = self.logit_soft_cap, None
        try:
            logits: Any = super().call(inputs, reverse=True)
        finally:
            self.logit_soft_cap = cap
        if self.head_bias is not None:
            logits = logits + jnp.asarray(self.head_bias, logits.dtype)
        logits = logits * self.logit_scale
        return logits if cap is None else cap * jnp.tanh(logits / cap)


class DecoderBackbone(keras_hub.models.Backbone):
    """Token embedding, decoder blocks and a norm; inputs `token_ids` and `padding_mask` (segment ids), both (B, T)."""

    def __init__(self, description: Description, dtype=None, **kwargs):
        self.token_embedding = DecoderEmbedding(description, dtype=dtype, name="token_embedding")
        self.transformer_layers = [
            DecoderBlock(block, description.hidden, dtype=dtype, name=f"transformer_layer_{number}")
            for number, block in enumerate(description.blocks)
        ]
        self.layer_norm = DecoderNorm(description.blocks[0].norm, dtype=dtype, name="sequence_output_layernorm")
        token_ids = keras.Input(shape=(None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input(shape=(None,), dtype="int32", name="padding_mask")
        x = _scaled(self.token_embedding(token_ids), description.embedding_scale)
        for layer in self.transformer_layers:
            x = layer(x, padding_mask=padding_mask)
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        super().__init__(inputs=inputs, outputs=self.layer_norm(x), dtype=dtype, **kwargs)

        self.description = description
        self.vocabulary_size = description.vocabulary


def _scaled(x, factor: float):
    return x if factor == 1 else x * factor


class DecoderCausalLM(keras_hub.models.Qwen3CausalLM):
    """The task that KerasHub's causal LMs are; `model.generate` decodes."""

    backbone_cls = DecoderBackbone
    preprocessor_cls = None


# --- the tensors that feed the variables -----------------------------------------------------------------------------


def fed_variables(backbone: DecoderBackbone) -> Iterator[Fed]:
    """Yield every variable with the tensor that feeds it."""
    description: Description = backbone.description
    embedding: Any = backbone.token_embedding
    yield embedding.embeddings, EMBEDDING, _reshaped
    if not embedding.tie_weights:
        yield embedding.reverse_embeddings, HEAD, _transposed
    if embedding.head_bias is not None:
        yield embedding.head_bias, HEAD.removesuffix("weight") + "bias", _reshaped
    yield from _of_norm(backbone.layer_norm, f"model.{description.last_norm}")
    for number, (layer, block) in enumerate(zip(backbone.transformer_layers, description.blocks, strict=True)):
        start = f"model.layers.{number}."
        for name, norm in layer.norms.items():
            yield from _of_norm(norm, start + name)
        attention, mlp = layer.self_attn, layer.mlp
        fused = () if block.attention.fused is None else (attention.fused,)
        for linear in (*(fused or (attention.q_proj, attention.k_proj, attention.v_proj)), attention.out):
            yield from _of_linear(linear, f"{start}self_attn.{linear.name}")
        if block.attention.norm is not None:
            norms = (attention.query_norm, attention.key_norm)
            for norm, name in zip(norms, block.attention.norm_names, strict=True):
                yield from _of_norm(norm, f"{start}self_attn.{name}")
        yield from (_of_experts if isinstance(mlp, DecoderExperts) else _of_mlp)(mlp, f"{start}{mlp.name}")


def _of_mlp(mlp: DecoderMlp, module: str) -> Iterator[Fed]:
    for linear in filter(None, (mlp.gate, mlp.up, mlp.down)):
        yield from _of_linear(linear, f"{module}.{linear.name}")
    for number, name in zip(mlp.activation.numbers, XIELU, strict=False):
        yield number, f"{module}.act_fn.{name}", _reshaped


def _of_experts(mixture: DecoderExperts, module: str) -> Iterator[Fed]:
    given = mixture.experts
    yield mixture.router, f"{module}.gate.weight", _transposed
    yield mixture.correction, f"{module}.{given.correction}", _reshaped
    for kernel, name in ((mixture.gate, given.gate), (mixture.up, given.up), (mixture.down, given.down)):
        yield kernel, [f"{module}.experts.{number}.{name}.weight" for number in range(given.count)], _transposed
    if mixture.shared is not None:
        yield from _of_mlp(mixture.shared, f"{module}.shared_experts")


def _of_norm(norm: DecoderNorm, module: str) -> Iterator[Fed]:
    yield norm.scale, f"{module}.weight", _reshaped
    if norm.bias is not None:
        yield norm.bias, f"{module}.bias", _reshaped


def _of_linear(layer, module: str) -> Iterator[Fed]:
    yield layer.kernel, f"{module}.weight", _transposed
    if layer.bias is not None:
        yield layer.bias, f"{module}.bias", _reshaped


def _reshaped(tensor: np.ndarray, shape) -> np.ndarray:
    return np.reshape(tensor, shape)


def _transposed(tensor: np.ndarray, shape) -> np.ndarray:
    """A kernel is the transpose of torch's weight, its dims split into heads."""
    return np.reshape(np.transpose(tensor), shape)
