"""Mixtures of experts in decoder blocks: KerasHub's layers and ours, made to compute the chosen experts only.

KerasHub's layers compute every expert for every token. `install` replaces their `call` by one that reads the same
weights: their router chooses, and `experts.routed` computes. Layers of ours take the computation as an attribute.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.sharding import Mesh

from kithara_ray.errors import ConfigError
from kithara_ray.model import keras_compat
from kithara_ray.model.blocks.experts import Choice, Compute, Factors, Kernels, SidePaths
from kithara_ray.model.identity import IdentityMap


def install(blocks: tuple[keras.layers.Layer, ...], compute: Compute) -> None:
    """Make the mixtures in these blocks compute in one of `blocks.experts`' ways, with LoRA's factors."""
    for layer in layers_of(blocks):
        replaced = REPLACED.get(type(layer).__name__)
        if replaced is None:
            layer.compute = compute
        else:
            layer.call = replaced(layer, compute)


def check_axis(blocks: tuple[keras.layers.Layer, ...], mesh: Mesh) -> None:
    """Check that the mesh's axis `expert` divides the experts of every mixture. Raises ConfigError."""
    ways = mesh.shape["expert"]
    counts = {count for count, _ in routing(blocks)}
    if ways > 1 and (not counts or any(count % ways for count in counts)):
        found = f"{', '.join(map(str, sorted(counts)))} experts a block" if counts else "no experts"
        raise ConfigError(
            f"mesh expert={ways}: the model has {found}; take a divisor of them for expert, or leave the axis out"
        )


def routing(blocks: tuple[keras.layers.Layer, ...]) -> list[tuple[int, int]]:
    """List E and K of every mixture in these blocks."""
    return [(bank.count, bank.chosen) for bank in banks_of(blocks)]


def shares(blocks: tuple[keras.layers.Layer, ...]) -> IdentityMap[keras.Variable, float]:
    """Map each kernel of experts, and its factors, to the share K / E of its experts that a token is sent to."""
    banks = banks_of(blocks)
    return IdentityMap(
        (variable, bank.chosen / bank.count)
        for bank in banks
        for variable in (*bank.kernels, *factor_variables(bank.layer))
    )


@dataclass(frozen=True)
class Bank:
    """The experts of one mixture.

    Attributes:
        mixture: the layer that chooses and computes them.
        layer: the layer that holds their kernels, and LoRA's factors.
        kernels: the variables of the first products' kernels, one or two, and then the last product's.
        count, chosen: E and K.
    """

    mixture: Any
    layer: Any
    kernels: tuple[keras.Variable, ...]
    count: int
    chosen: int


def banks_of(blocks: Sequence[keras.layers.Layer]) -> list[Bank]:
    """List the experts of all mixtures in these blocks."""
    made = []
    for layer in layers_of(blocks):
        kind = _KINDS[type(layer).__name__]
        bank = kind.bank(layer)
        made.append(Bank(layer, bank, tuple(kind.kernels(bank)), kind.count(layer), kind.chosen(layer)))
    return made


# LoRA's factors are attributes of the layer that holds the kernels: `lora_wide_A`, `_B`, `_scale`, and `lora_down_*`.
_PRODUCTS = ("wide", "down")


def add_factors(layer: Any, product: str, shapes: Sequence[tuple[int, int]], scale: float) -> list[keras.Variable]:
    """Add factors to a layer that holds experts' kernels, and return A and B; `product` is "wide" or "down"."""
    with keras_compat.adding_weights(layer):
        for letter, shape in zip("AB", shapes, strict=True):
            name = f"lora_{product}_{letter}"
            setattr(layer, name, layer.add_weight(name=name, shape=shape, dtype="float32", initializer="zeros"))
    setattr(layer, f"lora_{product}_scale", scale)
    return [getattr(layer, f"lora_{product}_{letter}") for letter in "AB"]


def factor_variables(layer: Any) -> list[keras.Variable]:
    """List the variables that `add_factors` added to a layer."""
    names = (f"lora_{product}_{letter}" for product in _PRODUCTS for letter in "AB")
    return [getattr(layer, name) for name in names if hasattr(layer, name)]


def factors_of(layer: Any, experts: int) -> SidePaths:
    """Return the factors of the kernels that a layer holds."""
    made: list[Factors | None] = []
    for product in _PRODUCTS:
        a, b = (getattr(layer, f"lora_{product}_{letter}", None) for letter in "AB")
        scale = getattr(layer, f"lora_{product}_scale", 1.0)
        made.append(None if a is None else Factors.of(jnp.asarray(a), jnp.asarray(b), experts, scale))
    return SidePaths(*made)


def layers_of(blocks: Sequence[keras.layers.Layer]) -> list[Any]:
    """Find the mixtures in these blocks."""
    layers = (layer for block in blocks for layer in keras_compat.all_layers(block))
    return [layer for layer in layers if type(layer).__name__ in _KINDS and getattr(layer, "enable_moe_block", True)]


def chosen(scores: jax.Array, count: int, normalised: bool) -> Choice:
    """Choose the `count` experts of the highest scores (..., E), float32; their factors may be made to add up to 1."""
    factors, numbers = jax.lax.top_k(scores.astype(jnp.float32), count)
    return Choice(numbers, factors / jnp.sum(factors, axis=-1, keepdims=True) if normalised else factors)


def gated(activation: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """The inner activation of gated experts, float32, of a gate and an up projection or of both in halves."""

    def inner(*products: jax.Array) -> jax.Array:
        gate, up = products if len(products) == 2 else jnp.split(products[0], 2, axis=-1)
        return activation(gate.astype(jnp.float32)) * up.astype(jnp.float32)

    return inner


# --- KerasHub's layers -----------------------------------------------------------------------------------------------


def _softmax_routed(layer: Any, compute: Compute) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The `call` of a mixture whose router is a softmax over all experts; a shared expert may stand beside."""
    router, normalised = keras_compat.router_of(layer), getattr(layer, "norm_top_k_prob", True)

    def call(hidden_states, attention_mask=None, training=None):
        *wide, down = (jnp.asarray(variable) for variable in keras_compat.expert_kernels_of(layer.expert_bank))
        factors = factors_of(layer.expert_bank, layer.num_experts)
        kernels = Kernels(tuple(wide), down, gated(jax.nn.silu), in_halves=len(wide) == 1, factors=factors)
        logits = router(hidden_states)
        choice = chosen(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), layer.top_k, normalised)
        out = compute(hidden_states, choice, kernels)
        if (shared := keras_compat.shared_expert_of(layer)) is not None:
            expert, gate = shared
            out = out + expert(hidden_states) * jax.nn.sigmoid(gate(hidden_states))
        return out, logits

    return call


def _gpt_oss(layer: Any, compute: Compute) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The `call` of gpt_oss' mixture: a softmax over the chosen experts, biases, and a clamped activation."""
    experts = layer.experts

    def inner(both: jax.Array) -> jax.Array:
        # A gate's column before each column of the up projection.
        # No slices with steps: a TPU's compiler takes minutes and gigabytes over their gradient.
        pairs = both.astype(jnp.float32).reshape(*both.shape[:-1], -1, 2)
        gate = jnp.minimum(pairs[..., 0], experts.limit)
        up = jnp.clip(pairs[..., 1], -experts.limit, experts.limit)
        return gate * jax.nn.sigmoid(gate * experts.alpha) * (up + 1)

    def call(hidden_states):
        names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
        wide, down, wide_bias, down_bias = (jnp.asarray(getattr(experts, name)) for name in names)
        logits = layer.router.router_dense(hidden_states)
        scores, numbers = jax.lax.top_k(logits, layer.top_k)
        choice = Choice(numbers, jax.nn.softmax(scores.astype(jnp.float32), axis=-1))
        factors = factors_of(experts, layer.num_experts)
        kernels = Kernels((wide,), down, inner, (wide_bias,), down_bias, factors=factors)
        return compute(hidden_states, choice, kernels), logits

    return call


# Layers whose `call` is replaced. Layers of ours have an attribute `compute`.
REPLACED: dict[str, Callable[[Any, Compute], Callable]] = {
    "MixtralSparseMoeBlock": _softmax_routed,
    "Qwen3SparseMoeBlock": _softmax_routed,
    "QwenSparseMoeBlock": _softmax_routed,
    "Qwen3_5MoeSparseMoeBlock": _softmax_routed,
    "GptOssSparseMoeBlock": _gpt_oss,
}


@dataclass(frozen=True)
class _Kind:
    """Find a mixture's E and K, the layer that holds the kernels of its experts, and these."""

    count: Callable[[Any], int] = lambda layer: layer.num_experts
    chosen: Callable[[Any], int] = lambda layer: layer.top_k
    bank: Callable[[Any], Any] = lambda layer: layer.expert_bank
    kernels: Callable[[Any], Sequence[keras.Variable]] = keras_compat.expert_kernels_of


_KINDS = dict.fromkeys(REPLACED, _Kind()) | {
    "GptOssSparseMoeBlock": _Kind(
        bank=lambda layer: layer.experts, kernels=lambda bank: [bank.gate_up_proj, bank.down_proj]
    ),
    "DecoderExperts": _Kind(
        lambda layer: layer.experts.count,
        lambda layer: layer.experts.chosen,
        lambda layer: layer,
        lambda layer: [layer.gate, layer.up, layer.down],
    ),
    "Gemma4Block": _Kind(
        lambda block: block.moe_router.num_experts,
        lambda block: block.moe_router.num_experts_per_token,
        lambda block: block.moe_expert_bank,
        lambda bank: [bank.gate_proj, bank.up_proj, bank.down_proj],
    ),
}
