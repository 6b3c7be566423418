"""What must be put right, family by family, before KerasHub computes what Hugging Face's config says.

A family is listed here when its parity test (tests/model/test_parity.py) is in the suite. Everything else is refused
by name before a weight is read: KerasHub's converters drop fields silently, and a silent wrong model is worse
than none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kithara_ray.errors import UnsupportedError


def _no_change(config: Mapping, kwargs: dict) -> None:
    """The converter's keyword arguments are right as they are."""


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face.

    Attributes:
        converter: module below `keras_hub.src.utils.transformers`.
        causal_lm: class name in `keras_hub.models`.
        check: raises UnsupportedError for fields that KerasHub cannot express.
        correct: changes the backbone's keyword arguments that the converter made.
        finish: changes the built backbone.
    """

    converter: str
    causal_lm: str
    check: Callable[[Mapping], None]
    correct: Callable[[Mapping, dict], None] = _no_change
    finish: Callable[[Mapping, object], None] = lambda config, backbone: None


def _refuse(config: Mapping, field: str, why: str) -> None:
    raise UnsupportedError(f"config.json: {field}={config.get(field)!r} of this {config['model_type']} model: {why}")


def _expect(config: Mapping, field: str, *allowed) -> None:
    """Refuse a field whose value changes the mathematics in a way that KerasHub does not know."""
    if field in config and config[field] not in allowed:
        _refuse(config, field, f"KerasHub computes it as {allowed[0]!r} only")


def _rope(config: Mapping) -> dict:
    """The rope settings under either of the names that transformers has written them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


# --- llama: Llama 3, 3.1, 3.2, SmolLM2 -------------------------------------------------------------------------------


def _check_llama(config: Mapping) -> None:
    _expect(config, "hidden_act", "silu")
    _expect(config, "attention_bias", False, None)
    _expect(config, "mlp_bias", False, None)
    _expect(config, "pretraining_tp", 1, None)
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim * config["num_attention_heads"] != config["hidden_size"]:
        _refuse(config, "head_dim", "KerasHub's llama derives head_dim as hidden_size / num_attention_heads")
    rope_type = _rope(config)["rope_type"]
    if rope_type not in ("default", "llama3"):
        _refuse(config, "rope_parameters", f"rope type {rope_type!r} is dropped by KerasHub's llama")


def _correct_llama(config: Mapping, kwargs: dict) -> None:
    # The converter drops rms_norm_eps and reads rope_scaling, which transformers 5 writes as rope_parameters.
    kwargs["layer_norm_epsilon"] = config["rms_norm_eps"]
    rope = _rope(config)
    kwargs["rope_max_wavelength"] = rope["rope_theta"]
    if rope["rope_type"] == "llama3":
        kwargs["rope_frequency_adjustment_factor"] = rope["factor"]
        kwargs["rope_low_freq_factor"] = rope["low_freq_factor"]
        kwargs["rope_high_freq_factor"] = rope["high_freq_factor"]
        kwargs["rope_pretraining_sequence_length"] = rope["original_max_position_embeddings"]


# --- gemma2 ----------------------------------------------------------------------------------------------------------


def _check_gemma2(config: Mapping) -> None:
    _expect(config, "hidden_activation", "gelu_pytorch_tanh", None)
    _expect(config, "attention_bias", False, None)
    _expect(config, "tie_word_embeddings", True, None)
    _expect(config, "use_bidirectional_attention", False, None)
    rope = _rope(config)
    if rope["rope_type"] != "default" or rope["rope_theta"] != 10000.0:
        _refuse(config, "rope_parameters", "KerasHub's gemma2 rotates with rope_theta 10000 only")
    per_head = config["hidden_size"] // config["num_attention_heads"]
    if config["query_pre_attn_scalar"] not in (config["head_dim"], per_head):
        _refuse(config, "query_pre_attn_scalar", f"KerasHub scales queries by head_dim or hidden/heads = {per_head}")
    layer_types = config.get("layer_types")
    pattern = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(config["num_hidden_layers"])]
    if layer_types is not None and list(layer_types) != pattern:
        _refuse(config, "layer_types", "KerasHub alternates sliding and full attention, sliding first")


def _correct_gemma2(config: Mapping, kwargs: dict) -> None:
    kwargs["layer_norm_epsilon"] = config["rms_norm_eps"]


def _finish_gemma2(config: Mapping, backbone) -> None:
    # The block hardcodes query_head_dim_normalize=True (gemma-2-27b scales by hidden/heads = 144, not by head_dim 128).
    normalize = config["query_pre_attn_scalar"] == config["head_dim"]
    for block in backbone.transformer_layers:
        block.attention.query_head_dim_normalize = normalize
        # and keeps the norms' default epsilon.
        for name in ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm"):
            getattr(block, name).epsilon = config["rms_norm_eps"]


FAMILIES: dict[str, Family] = {
    "llama": Family("convert_llama3", "Llama3CausalLM", _check_llama, _correct_llama),
    "gemma2": Family("convert_gemma", "GemmaCausalLM", _check_gemma2, _correct_gemma2, _finish_gemma2),
}


def family_of(config: Mapping) -> Family:
    """The family of a Hugging Face config, its fields checked.

    Raises:
        UnsupportedError: an unknown `model_type`, or a field that KerasHub cannot express.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"config.json: model_type={model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))} "
            "(a family is added with a test that its logits equal transformers')"
        )
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"config.json: a base quantised by {config['quantization_config'].get('quant_method')!r} cannot be trained "
            "or merged; use the unquantised checkpoint"
        )
    family = FAMILIES[model_type]
    family.check(config)
    return family
