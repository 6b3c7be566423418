"""Corrections for llama (Llama 3, 3.1, 3.2, SmolLM2), mistral, qwen2, qwen3 and smollm3."""

from collections.abc import Mapping

import numpy as np

from kithara_ray.model import keras_compat
from kithara_ray.model.families import general
from kithara_ray.model.families.family import (
    Family,
    check_derived_head_dim,
    check_no_window,
    check_rope,
    expect,
    with_defaults,
)

_ABSENT = (False, None)


def _limits_of_llama(config: Mapping) -> None:
    expect(config, hidden_act=("silu",), attention_bias=_ABSENT, mlp_bias=_ABSENT)
    check_derived_head_dim(config)
    check_rope(config, "default", "llama3")


def _complete_llama(config: Mapping) -> dict:
    # The first Llama 2 have no num_key_value_heads.
    keys = {"num_key_value_heads": config["num_attention_heads"]} if "num_attention_heads" in config else {}
    return dict(rms_norm_eps=1e-6, tie_word_embeddings=False) | keys | dict(config)


def _correct_llama(config: Mapping, kwargs: dict) -> None:
    # The converter drops rms_norm_eps and reads rope_scaling, which transformers 5 writes as rope_parameters.
    kwargs["layer_norm_epsilon"] = config["rms_norm_eps"]
    rope = config["rope_parameters"]
    kwargs["rope_max_wavelength"] = rope["rope_theta"]
    if rope["rope_type"] == "llama3":
        kwargs["rope_frequency_adjustment_factor"] = rope["factor"]
        kwargs["rope_low_freq_factor"] = rope["low_freq_factor"]
        kwargs["rope_high_freq_factor"] = rope["high_freq_factor"]
        kwargs["rope_pretraining_sequence_length"] = rope["original_max_position_embeddings"]


def _limits_of_mistral(config: Mapping) -> None:
    # KerasHub's mistral always has a separate head.
    expect(config, hidden_act=("silu",), tie_word_embeddings=_ABSENT)
    check_rope(config, "default")


def _limits_of_qwen2(config: Mapping) -> None:
    # Both libraries use biases of q, k and v, whatever `attention_bias` says.
    expect(config, hidden_act=("silu",))
    check_derived_head_dim(config)
    check_rope(config, "default")
    check_no_window(config)


def _correct_qwen2(config: Mapping, kwargs: dict) -> None:
    # The backbone has no argument with this name; no block has a window, see check_no_window.
    del kwargs["use_sliding_window"], kwargs["sliding_window_size"]


def _limits_of_qwen3(config: Mapping) -> None:
    expect(config, hidden_act=("silu",), attention_bias=_ABSENT)
    check_rope(config, "default")
    check_no_window(config)


def _correct_qwen3(config: Mapping, kwargs: dict) -> None:
    kwargs["sliding_window_size"] = None


def _finish_qwen3(config: Mapping, backbone) -> None:
    # The norms inside the blocks keep their default epsilon.
    for layer in keras_compat.all_layers(backbone):
        if type(layer).__name__ == "Qwen3LayerNorm":
            layer.epsilon = config["rms_norm_eps"]


def _complete_smollm3(config: Mapping) -> dict:
    whole = {
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_theta": 2e6,
        "max_position_embeddings": 32_768,
    } | dict(config)
    layers, interval = whole["num_hidden_layers"], whole.get("no_rope_layer_interval", 4)
    # Despite the field's name, 1 means that a block rotates.
    if whole.get("no_rope_layers") is None:
        whole["no_rope_layers"] = [int((i + 1) % interval != 0) for i in range(layers)]
    if whole.get("layer_types") is None:
        slides = whole.get("use_sliding_window") and whole.get("sliding_window") is not None
        kinds = ("full_attention", "sliding_attention")
        whole["layer_types"] = [kinds[bool(slides and not rotates)] for rotates in whole["no_rope_layers"]]
    return whole


def _limits_of_smollm3(config: Mapping) -> None:
    expect(config, hidden_act=("silu",), attention_bias=_ABSENT, mlp_bias=_ABSENT)
    expect(config, tie_word_embeddings=(True, None), layer_types=(["full_attention"] * config["num_hidden_layers"],))
    expect(config, use_sliding_window=_ABSENT)
    check_derived_head_dim(config)
    check_rope(config, "default")


def _finish_smollm3(config: Mapping, backbone) -> None:
    for block in backbone.transformer_layers:
        # KerasHub reads this only while it builds a block; later it would make equal blocks look different.
        block.layer_idx = block.self_attn.layer_idx = 0
        # KerasHub keeps this constant as a variable, which no tensor feeds.
        rotary = block.self_attn.rotary_embedding
        keras_compat.forget_variable(rotary, rotary.inv_freq)
        exponents = np.arange(0, rotary.head_dim, 2, dtype=np.float32) / np.float32(rotary.head_dim)
        rotary.inv_freq = rotary.original_inv_freq = 1 / np.float32(rotary.rope_theta) ** exponents


_QWEN = dict(
    rms_norm_eps=1e-6, tie_word_embeddings=False, use_sliding_window=False, sliding_window=4096, max_window_layers=28
)

FAMILIES = {
    "llama": Family(
        "convert_llama3",
        "Llama3CausalLM",
        correct=_correct_llama,
        complete=_complete_llama,
        limits=_limits_of_llama,
        general=general.llama,
    ),
    # Its converter also casts weights through float16: see ports.Piece.view.
    "mistral": Family(
        "convert_mistral",
        "MistralCausalLM",
        complete=with_defaults(rms_norm_eps=1e-6, sliding_window=4096),
        limits=_limits_of_mistral,
        general=general.mistral,
    ),
    "qwen2": Family(
        "convert_qwen",
        "QwenCausalLM",
        correct=_correct_qwen2,
        complete=with_defaults(**_QWEN),
        limits=_limits_of_qwen2,
        general=general.qwen2,
    ),
    "qwen3": Family(
        "convert_qwen3",
        "Qwen3CausalLM",
        correct=_correct_qwen3,
        finish=_finish_qwen3,
        complete=with_defaults(head_dim=128, **_QWEN),
        limits=_limits_of_qwen3,
        general=general.qwen3,
    ),
    "smollm3": Family(
        "convert_smollm3",
        "SmolLM3CausalLM",
        finish=_finish_smollm3,
        complete=_complete_smollm3,
        takes_dtype=False,
        limits=_limits_of_smollm3,
        general=general.smollm3,
    ),
}
