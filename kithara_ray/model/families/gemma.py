"""Corrections for gemma, gemma2 and gemma3's text model, whose settings KerasHub drops in part."""

from collections.abc import Mapping
from typing import Any

from kithara_ray.model.families.family import Family, expect, refuse, rope_of, with_defaults

_NORMS = ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")


def _check_every(config: Mapping) -> None:
    tanh = ("gelu_pytorch_tanh", None)
    # transformers also reads gemma's legacy value "gelu" as the tanh approximation.
    expect(config, **({"hidden_act": (*tanh, "gelu")} if config["model_type"] == "gemma" else {}))
    expect(config, **({"hidden_activation": tanh} if config["model_type"] != "gemma" else {}))
    expect(config, attention_bias=(False, None), tie_word_embeddings=(True, None))
    expect(config, use_bidirectional_attention=(False, None))


def _check_theta(config: Mapping) -> None:
    rope = rope_of(config)
    if rope["rope_type"] != "default" or rope["rope_theta"] != 10000.0:
        refuse(config, "rope_parameters", f"KerasHub's {config['model_type']} rotates with rope_theta 10000 only")


def _check_query_scale(config: Mapping) -> None:
    per_head = config["hidden_size"] // config["num_attention_heads"]
    if config["query_pre_attn_scalar"] not in (config["head_dim"], per_head):
        refuse(config, "query_pre_attn_scalar", f"KerasHub scales queries by head_dim or hidden/heads = {per_head}")


def _check_gemma(config: Mapping) -> None:
    _check_every(config)
    _check_theta(config)


def _check_gemma2(config: Mapping) -> None:
    _check_every(config)
    _check_theta(config)
    _check_query_scale(config)
    layer_types = config.get("layer_types")
    pattern = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(config["num_hidden_layers"])]
    if layer_types is not None and list(layer_types) != pattern:
        refuse(config, "layer_types", "KerasHub alternates sliding and full attention, sliding first")


def _correct(config: Mapping, kwargs: dict) -> None:
    kwargs["layer_norm_epsilon"] = config["rms_norm_eps"]


def _finish(config: Mapping, backbone) -> None:
    # The block hardcodes query_head_dim_normalize=True (gemma-2-27b scales by hidden/heads = 144, not by head_dim 128).
    # transformers does not read the field in gemma.
    normalize = config["model_type"] == "gemma" or config["query_pre_attn_scalar"] == config["head_dim"]
    for block in backbone.transformer_layers:
        block.attention.query_head_dim_normalize = normalize
        # The block also keeps the norms' default epsilon.
        for name in _NORMS:
            if hasattr(block, name):
                getattr(block, name).epsilon = config["rms_norm_eps"]


# --- gemma3 ----------------------------------------------------------------------------------------------------------

_GEMMA3 = dict(rms_norm_eps=1e-6, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096)


# Published configs of the multimodal models leave these out.
_GEMMA3 = dict(
    vocab_size=262_208,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    sliding_window=4096,
    max_position_embeddings=131_072,
)


def _complete_gemma3(config: Mapping) -> dict:
    """Rope settings by layer type, as transformers 5 writes them; formerly, `rope_scaling` was for full layers only."""
    whole: dict[str, Any] = {**_GEMMA3, **config}
    given = whole.get("rope_parameters") or {}
    rope = {kind: dict(given.get(kind) or {}) for kind in ("full_attention", "sliding_attention")}
    rope["full_attention"].update(whole.pop("rope_scaling", None) or {})
    rope["full_attention"].setdefault("rope_theta", whole.get("rope_theta", 1_000_000.0))
    rope["sliding_attention"].setdefault("rope_theta", whole.get("rope_local_base_freq", 10_000.0))
    for settings in rope.values():
        settings["rope_type"] = settings.get("rope_type") or settings.get("type") or "default"
    whole["rope_parameters"] = rope
    if whole.get("layer_types") is None:
        pattern = whole.get("sliding_window_pattern", whole.get("_sliding_window_pattern", 6))
        last = [(i + 1) % pattern == 0 for i in range(whole["num_hidden_layers"])]
        whole["layer_types"] = ["full_attention" if full else "sliding_attention" for full in last]
    return whole


def _check_gemma3(config: Mapping) -> None:
    _check_every(config)
    if config.get("attn_logit_softcapping") is not None:
        refuse(config, "attn_logit_softcapping", "KerasHub applies it and transformers does not")
    _check_query_scale(config)
    for kind, rope in config["rope_parameters"].items():
        if rope["rope_type"] not in ("default", "linear"):
            refuse(config, "rope_parameters", f"rope type {rope['rope_type']!r} of {kind} is dropped by KerasHub")


def _finish_gemma3(config: Mapping, backbone) -> None:
    _finish(config, backbone)
    for block, kind in zip(backbone.transformer_layers, config["layer_types"], strict=True):
        attention, rope = block.attention, config["rope_parameters"][kind]
        # KerasHub hardcodes five sliding blocks to a full one, and both wavelengths.
        sliding, factor = kind == "sliding_attention", rope["factor"] if rope["rope_type"] == "linear" else 1.0
        block.use_sliding_window_attention = attention.use_sliding_window_attention = sliding
        block.rope_wavelength = attention.rope_wavelength = attention.rope_layer.max_wavelength = rope["rope_theta"]
        block.rope_scaling_factor = attention.rope_scaling_factor = attention.rope_layer.scaling_factor = factor
        attention.query_norm.epsilon = attention.key_norm.epsilon = config["rms_norm_eps"]


_GEMMA = dict(rms_norm_eps=1e-6, head_dim=256)
_GEMMA2 = _GEMMA | dict(
    query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
)

FAMILIES = {
    "gemma": Family(
        "convert_gemma", "GemmaCausalLM", _check_gemma, _correct, _finish, complete=with_defaults(**_GEMMA)
    ),
    "gemma2": Family(
        "convert_gemma", "GemmaCausalLM", _check_gemma2, _correct, _finish, complete=with_defaults(**_GEMMA2)
    ),
    "gemma3_text": Family(
        "convert_gemma3", "Gemma3CausalLM", _check_gemma3, finish=_finish_gemma3, complete=_complete_gemma3
    ),
}
