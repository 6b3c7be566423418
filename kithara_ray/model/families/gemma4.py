"""Corrections for gemma4's text model with one dense MLP per block, and a block that LoRA can adapt."""

import functools
from collections.abc import Mapping

from kithara_ray.model import keras_compat
from kithara_ray.model.families.family import Family, expect, refuse

_ABSENT = (False, None)
_DEFAULTS = dict(
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    attention_k_eq_v=False,
    num_kv_shared_layers=0,
    hidden_size_per_layer_input=256,
    enable_moe_block=False,
    final_logit_softcapping=None,
    sliding_window=512,
)
_ROPE = {
    "full_attention": dict(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1_000_000.0),
    "sliding_attention": dict(rope_type="default", rope_theta=10_000.0),
}


def _complete(config: Mapping) -> dict:
    """Convert older `global_*` fields of the full layers to transformers 5's `per_layer_config`, and add defaults."""
    whole = _DEFAULTS | dict(config)
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
        whole["per_layer_config"] = {str(i): own for i in full}
    return whole


def _check(config: Mapping) -> None:
    expect(config, hidden_activation=("gelu_pytorch_tanh", None), tie_word_embeddings=(True, None))
    expect(config, attention_bias=_ABSENT)
    # "vision" lets the tokens of an image see each other; text has none.
    expect(config, use_bidirectional_attention=(None, "vision"))
    if config["num_kv_shared_layers"]:
        refuse(config, "num_kv_shared_layers", "blocks that share keys and values cannot be scanned here")
    if config["hidden_size_per_layer_input"]:
        refuse(config, "hidden_size_per_layer_input", "embeddings of each block's own are not supported here")
    if config["enable_moe_block"]:
        refuse(config, "enable_moe_block", "experts beside the MLP are not supported here")
    full, sliding = (config["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention"))
    if full["rope_type"] not in ("default", "proportional") or sliding["rope_type"] != "default":
        refuse(config, "rope_parameters", "KerasHub rotates full layers 'proportional' and sliding ones 'default'")
    if sliding.get("partial_rotary_factor", 1.0) != 1.0 or full.get("factor", 1.0) != 1.0:
        refuse(config, "rope_parameters", "KerasHub knows no factor of sliding layers, and no scaling of full ones")
    _full_layers(config)


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

    class Gemma4DenseBlock(keras_compat.gemma4_text_block()):
        """A block that calls its MLP's layers, so that LoRA can adapt them; KerasHub's multiplies by their kernels.

        `call` keeps the signature that Keras has cached for the block.
        """

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
            attended, new_cache = self.attention(normed, attention_mask=mask, positions=positions, **cached)
            x = x + self.post_attention_norm(attended)
            normed = self.pre_ffw_norm(x)
            gate = keras.activations.gelu(self.gating_ffw(normed), approximate=True)
            x = x + self.post_ffw_norm(self.ffw_linear(gate * self.gating_ffw_2(normed)))
            return x * keras.ops.cast(self.layer_scalar, x.dtype), new_cache

    return Gemma4DenseBlock


FAMILIES = {"gemma4_text": Family("convert_gemma4", "Gemma4CausalLM", _check, _correct, _finish, complete=_complete)}
