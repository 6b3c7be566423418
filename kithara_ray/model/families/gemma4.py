"""Corrections for gemma4's text model, and a block that LoRA can adapt.

    B  rows    T  positions    D  hidden width    E  experts    K  experts of a token

Its forms: dense blocks (31B, 12B); embeddings for each block, and later blocks that attend to the keys and values of
earlier ones (E2B, E4B); experts beside the MLP (26B-A4B).
"""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kithara_ray.model import keras_compat
from kithara_ray.model.families.family import Family, expect, refuse

if TYPE_CHECKING:
    from kithara_ray.model.blocks.experts import Choice, Kernels

_ABSENT = (False, None)
# Fields of gemma4_text that gemma4_unified_text does not have: it has neither experts nor embeddings for each block.
_OF_GEMMA4 = dict(
    hidden_size_per_layer_input=256,
    vocab_size_per_layer_input=262_144,
    enable_moe_block=False,
    num_experts=None,
    top_k_experts=None,
    moe_intermediate_size=None,
)
_DEFAULTS = dict(
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    attention_k_eq_v=False,
    num_kv_shared_layers=0,
    use_double_wide_mlp=False,
    final_logit_softcapping=None,
)
_ROPE = {
    "full_attention": dict(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1_000_000.0),
    "sliding_attention": dict(rope_type="default", rope_theta=10_000.0),
}


def _complete(config: Mapping) -> dict:
    """Convert older `global_*` fields of the full layers to transformers 5's `per_layer_config`, and add defaults."""
    unified = config["model_type"] == "gemma4_unified_text"
    window = dict(sliding_window=1024 if unified else 512)
    whole: dict[str, Any] = {**_DEFAULTS, **window, **({} if unified else _OF_GEMMA4), **config}
    whole["rope_parameters"] = whole.pop("rope_scaling", None) or whole.get("rope_parameters") or _ROPE
    layers = whole["num_hidden_layers"]
    kinds = whole.get("layer_types") or ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    whole["layer_types"] = [*kinds[:-1], "full_attention"]
    head_dim, kv_heads = whole.pop("global_head_dim", 512), whole.pop("num_global_key_value_heads", None)
    if "per_layer_config" not in whole:
        own = {"head_dim": head_dim}
        if kv_heads is not None and whole["attention_k_eq_v"]:
            own["num_key_value_heads"] = kv_heads
        full = (i for i, kind in enumerate(whole["layer_types"]) if kind == "full_attention")
        whole["per_layer_config"] = {i: own for i in full}
    # transformers pads the numbers with zeros.
    whole["per_layer_config"] = {str(int(number)): own for number, own in whole["per_layer_config"].items()}
    return whole


def _check(config: Mapping) -> None:
    expect(config, hidden_activation=("gelu_pytorch_tanh", None), tie_word_embeddings=(True, None))
    if config.get("attn_logit_softcapping") is not None:
        refuse(config, "attn_logit_softcapping", "KerasHub applies it and transformers does not")
    expect(config, attention_bias=_ABSENT)
    # "vision" lets the tokens of an image see each other; text has none.
    expect(config, use_bidirectional_attention=(None, "vision"))
    _check_sharing(config)
    if config.get("enable_moe_block"):
        _check_experts(config)
    full, sliding = (config["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention"))
    if full["rope_type"] not in ("default", "proportional") or sliding["rope_type"] != "default":
        refuse(config, "rope_parameters", "KerasHub rotates full layers 'proportional' and sliding ones 'default'")
    if sliding.get("partial_rotary_factor", 1.0) != 1.0 or full.get("factor", 1.0) != 1.0:
        refuse(config, "rope_parameters", "KerasHub knows no factor of sliding layers, and no scaling of full ones")
    _full_layers(config)


def _check_sharing(config: Mapping) -> None:
    own = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    kinds = config["layer_types"]
    if len(kinds) != config["num_hidden_layers"]:
        refuse(config, "layer_types", f"{len(kinds)} entries for {config['num_hidden_layers']} layers")
    if not 0 < own <= len(kinds) or set(kinds[:own]) != set(kinds):
        refuse(config, "num_kv_shared_layers", "each kind of block needs one with keys and values of its own")


def _check_experts(config: Mapping) -> None:
    for field in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        if not config[field]:
            refuse(config, field, "enable_moe_block needs it")
    if config["top_k_experts"] > config["num_experts"]:
        refuse(config, "top_k_experts", f"there are {config['num_experts']} experts")


def _full_layers(config: Mapping) -> Mapping:
    """The settings in which full layers differ from the others."""
    kinds = config["layer_types"]
    own = {int(layer): dict(fields) for layer, fields in config["per_layer_config"].items()}
    full = own.get(kinds.index("full_attention"), {})
    expected = {i: full for i, kind in enumerate(kinds) if kind == "full_attention" and full}
    if own != expected or full.keys() - {"head_dim", "num_key_value_heads"}:
        refuse(config, "per_layer_config", "KerasHub knows a head_dim and num_key_value_heads of all full layers alone")
    if "num_key_value_heads" in full and not config["attention_k_eq_v"]:
        refuse(config, "per_layer_config", "KerasHub knows key heads of full layers' own only with attention_k_eq_v")
    return full


def _correct(config: Mapping, kwargs: dict) -> None:
    full = _full_layers(config)
    kwargs["global_head_dim"] = full.get("head_dim", config["head_dim"])
    # A value tells KerasHub that full layers use their keys as values.
    kv_heads = full.get("num_key_value_heads", config["num_key_value_heads"])
    kwargs["num_global_key_value_heads"] = kv_heads if config["attention_k_eq_v"] else None
    rope = config["rope_parameters"]["full_attention"]
    partial = rope.get("partial_rotary_factor", 1.0) if rope["rope_type"] == "proportional" else 1.0
    kwargs["global_rope_partial_rotary_factor"] = partial


def _finish(config: Mapping, backbone) -> None:
    for block in backbone.transformer_layers:
        block.__class__ = _block_class()


@functools.cache
def _block_class() -> type:
    import keras

    from kithara_ray.model.blocks import experts

    class Gemma4Block(keras_compat.gemma4_text_block()):
        """A block that calls its MLP's layers, so that LoRA can adapt them; KerasHub's multiplies by their kernels.

        `call` keeps the signature that Keras has cached for the block. `compute` is one of `blocks.experts`' ways, if
        the block has experts.
        """

        compute = staticmethod(experts.dense)

        def call(
            self,
            x,
            padding_mask=None,
            vision_mask=None,
            cache=None,
            cache_update_index=0,
            cache_update_mask=None,
            per_layer_input=None,
            shared_kv=None,
            positions=None,
        ):
            normed = self.pre_attention_norm(x)
            build_mask = keras_compat.mask_builder_of(self)
            mask = build_mask(normed, padding_mask, vision_mask, cache, cache_update_index)
            cached = {}
            if cache is not None:
                cached = dict(cache=cache, cache_update_index=cache_update_index, cache_update_mask=cache_update_mask)
            attended, keys = self.attention(
                normed, attention_mask=mask, shared_kv=shared_kv, positions=positions, **cached
            )
            x = x + self.post_attention_norm(attended)
            x = x + self.post_ffw_norm(self._feedforward(x))
            if per_layer_input is not None:
                gate: Any = keras.activations.gelu(self.per_layer_input_gate(x), approximate=True)
                own = gate * keras.ops.cast(per_layer_input, gate.dtype)
                x = x + self.post_per_layer_input_norm(self.per_layer_up_proj(own))
            return x * keras.ops.cast(self.layer_scalar, x.dtype), keys

        def _feedforward(self, x):
            normed = self.pre_ffw_norm(x)
            gate = keras.activations.gelu(self.gating_ffw(normed), approximate=True)
            out = self.ffw_linear(gate * self.gating_ffw_2(normed))
            if not self.enable_moe_block:
                return out
            mixed = self.compute(self.pre_ffw_norm_moe(x), *_mixture(self, x))
            return self.post_ffw_norm_dense(out) + self.post_ffw_norm_moe_path(mixed)

    return Gemma4Block


def _mixture(block: Any, x_BTD) -> "tuple[Choice, Kernels]":
    """Choose a block's experts in float32; KerasHub's router chooses by probabilities rounded to bfloat16."""
    import jax  # a driver checks configurations without it
    import jax.numpy as jnp

    from kithara_ray.model.blocks.experts import Choice, Kernels
    from kithara_ray.model.blocks.mixtures import chosen, factors_of, gated

    router, bank = block.moe_router, block.moe_expert_bank
    normed = router.rms_norm(x_BTD)
    normed = normed * jnp.asarray(router.per_dim_scale, normed.dtype) * normed.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(router.proj(normed).astype(jnp.float32), axis=-1)
    choice = chosen(probabilities, router.num_experts_per_token, normalised=True)
    gate, up, down, scale_E = (
        jnp.asarray(variable, normed.dtype)
        for variable in (bank.gate_proj, bank.up_proj, bank.down_proj, bank.per_expert_scale)
    )
    factors_BTK = choice.factors_BTK * scale_E.astype(jnp.float32)[choice.experts_BTK]
    kernels = Kernels((gate, up), down, gated(jax.nn.gelu), factors=factors_of(bank, router.num_experts))
    return Choice(choice.experts_BTK, factors_BTK), kernels


_TEXT = Family(
    "convert_gemma4", "Gemma4CausalLM", _check, _correct, _finish, complete=_complete, converts_as="gemma4_text"
)
FAMILIES = {"gemma4_text": _TEXT, "gemma4_unified_text": _TEXT}
