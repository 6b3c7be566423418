"""Families that KerasHub has no converter for, as decoders of ours: llama with a twist, each its own."""

from collections.abc import Mapping

from kithara_ray.model.decoder.description import Description, Norm
from kithara_ray.model.families.family import Family, check_derived_head_dim, expect, refuse, with_defaults
from kithara_ray.model.families.general import (
    FULL,
    SLIDING,
    decoder,
    kinds_of,
    llama,
    rms,
    rotation,
    windows_of,
)

# Norms behind attention and MLP instead of before them.
_NORMS_AFTER = {
    "before_attention": None,
    "after_attention": "post_attention_layernorm",
    "before_mlp": None,
    "after_mlp": "post_feedforward_layernorm",
}
_FUSED_MLP = {"gate": "gate_up_proj", "up": "gate_up_proj"}
_NO_GATE = {"gate": None}


def _layer_norm(config: Mapping, epsilon: str = "layer_norm_eps", bias: bool = True, offset: float = 0.0) -> Norm:
    return Norm("layer", config[epsilon], bias, offset)


# --- phi -------------------------------------------------------------------------------------------------------------


def _complete_phi3(config: Mapping) -> dict:
    whole = {"original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0, "sliding_window": None}
    whole |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_key_value_heads": None} | dict(config)
    whole["num_key_value_heads"] = whole["num_key_value_heads"] or whole.get("num_attention_heads", 32)
    name = "rope_scaling" if whole.get("rope_scaling") else "rope_parameters"
    rope = dict(whole.get(name) or {})
    # Former names of the same computation.
    if (rope.get("rope_type") or rope.get("type")) in ("su", "yarn"):
        whole[name] = rope | {"rope_type": "longrope"}
    return whole


def _check_phi3(config: Mapping) -> None:
    if config["rope_parameters"]["rope_type"] not in ("default", "longrope"):
        refuse(config, "rope_parameters", "transformers knows the rope types default and longrope here")


def _phi3(config: Mapping) -> Description:
    return decoder(
        config,
        rms(config),
        attention={"fused": "qkv_proj"},
        mlp=_FUSED_MLP,
        windows=config["sliding_window"],
        rotations=rotation(config, partial=True),
    )


def _phi(config: Mapping) -> Description:
    norm = _layer_norm(config)
    attention = {"bias": True, "out_bias": True, "out_name": "dense"}
    if config["qk_layernorm"]:
        attention |= {"norm": norm, "norm_names": ("q_layernorm", "k_layernorm")}
    return decoder(
        config,
        norm,
        attention=attention,
        mlp={"gate": None, "up": "fc1", "down": "fc2", "bias": True},
        block={"parallel": True, "before_mlp": None},
        rotations=rotation(config, partial=True),
        last_norm="final_layernorm",
        head_bias=True,
    )


# --- norms and multipliers -------------------------------------------------------------------------------------------


def _granite(config: Mapping) -> Description:
    bias = bool(config["attention_bias"])
    return decoder(
        config,
        rms(config),
        attention={"scale": config["attention_multiplier"], "bias": bias, "out_bias": bias},
        mlp={"bias": bool(config["mlp_bias"])},
        block={"residual": config["residual_multiplier"]},
        embedding_scale=config["embedding_multiplier"],
        logit_scale=1 / config["logits_scaling"],
    )


def _olmo(config: Mapping, **more) -> Description:
    norm, bias = rms(config), bool(config["attention_bias"])
    attention = {"bias": bias, "out_bias": bias, "norm": norm, "norm_whole": True}
    return decoder(config, norm, attention=attention, block=_NORMS_AFTER, **more)


def _complete_olmo3(config: Mapping) -> dict:
    """Rope settings by the kind of block, as transformers writes them; only full blocks take `rope_scaling`."""
    whole = {"rms_norm_eps": 1e-5, "sliding_window": 4096, "attention_bias": False, "tie_word_embeddings": False}
    whole |= dict(config)
    given, rope = whole.get("rope_parameters") or {}, {}
    for kind in (FULL, SLIDING):
        rope[kind] = dict(given.get(kind) or {})
    rope[FULL].update(whole.pop("rope_scaling", None) or {})
    rope[FULL].setdefault("rope_theta", whole.get("rope_theta", 500_000.0))
    rope[SLIDING].setdefault("rope_theta", 500_000.0)
    for settings in rope.values():
        settings["rope_type"] = settings.get("rope_type") or settings.get("type") or "default"
        if settings["rope_type"] in ("llama3", "yarn", "longrope") and whole.get("max_position_embeddings"):
            settings.setdefault("original_max_position_embeddings", whole["max_position_embeddings"])
    whole["rope_parameters"] = rope
    whole["layer_types"] = whole.get("layer_types") or _every_fourth_full(whole)
    return whole


def _every_fourth_full(config: Mapping, pattern: int = 4) -> list[str]:
    return [SLIDING if (number + 1) % pattern else FULL for number in range(config["num_hidden_layers"])]


def _olmo3(config: Mapping) -> Description:
    # transformers looks for `truncate` beside the kinds of blocks, and never finds it.
    turns = {kind: rotation(config, rope=rope | {"truncate": True}) for kind, rope in config["rope_parameters"].items()}
    return _olmo(config, windows=windows_of(config), rotations=[turns[kind] for kind in kinds_of(config)])


def _glm4(config: Mapping) -> Description:
    return decoder(
        config,
        rms(config),
        attention={"bias": bool(config["attention_bias"])},
        mlp=_FUSED_MLP,
        block={"after_attention": "post_self_attn_layernorm", "after_mlp": "post_mlp_layernorm"},
        rotations=rotation(config, interleaved=True, partial=True),
    )


# --- biases, windows, rotations --------------------------------------------------------------------------------------


_MINISTRAL3_ROPE = dict(
    type="yarn", rope_theta=1_000_000.0, factor=16.0, original_max_position_embeddings=16_384, beta_fast=32.0,
    beta_slow=1.0, mscale_all_dim=1.0, mscale=1.0, llama_4_scaling_beta=0.1,
)  # fmt: skip


def _seed_oss(config: Mapping) -> Description:
    attention = {"bias": bool(config["attention_bias"]), "out_bias": bool(config["attention_out_bias"])}
    return decoder(config, rms(config), attention=attention, mlp={"bias": bool(config["mlp_bias"])})


def _complete_ministral3(config: Mapping) -> dict:
    whole = {"rms_norm_eps": 1e-5, "head_dim": 128, "sliding_window": None, "tie_word_embeddings": False}
    whole |= {"max_position_embeddings": 262_144} | dict(config)
    if not (whole.get("rope_scaling") or whole.get("rope_parameters")):
        own = {"max_position_embeddings": whole["max_position_embeddings"]}
        whole["rope_parameters"] = _MINISTRAL3_ROPE | own
    return whole


def _ministral3(config: Mapping) -> Description:
    rope = config["rope_parameters"]
    growth = (float(rope["llama_4_scaling_beta"]), int(rope["original_max_position_embeddings"]))
    if growth[1] < 1:
        refuse(config, "rope_parameters", "original_max_position_embeddings is no number of tokens")
    return decoder(config, rms(config), attention={"growth": growth}, windows=config["sliding_window"])


def _hunyuan(config: Mapping) -> Description:
    norm, bias, rope = rms(config), bool(config["attention_bias"]), dict(config["rope_parameters"])
    attention = {"bias": bias, "out_bias": bias, "norm": norm, "norm_after_rotation": True}
    if rope["rope_type"] == "dynamic" and rope.get("alpha"):
        # A base that is stretched once, for any length.
        width = rotation(config, rope=rope | {"rope_type": "default"})
        dims = 2 * len(width.frequencies)
        rope |= {"rope_type": "default", "rope_theta": rope["rope_theta"] * rope["alpha"] ** (dims / (dims - 2))}
    turn = rotation(config, rope=rope)
    return decoder(
        config,
        norm,
        attention=attention | {"norm_names": ("query_layernorm", "key_layernorm")},
        rotations=turn,
    )


def _ernie(config: Mapping) -> Description:
    bias, turn = bool(config["use_bias"]), rotation(config, interleaved=True)
    return decoder(
        config,
        rms(config),
        attention={"bias": bias, "out_bias": bias},
        mlp={"bias": bias},
        rotations=turn,
    )


def _complete_exaone(config: Mapping) -> dict:
    whole = {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4, "tie_word_embeddings": False}
    whole |= dict(config)
    if whole.get("layer_types") is None:
        pattern = whole["sliding_window_pattern"] if whole["sliding_window"] is not None else 0
        whole["layer_types"] = _every_fourth_full(whole, pattern)
    return whole


def _exaone(config: Mapping) -> Description:
    norm, windows, turn = rms(config), windows_of(config), rotation(config)
    # If some blocks have a window, those without one do not rotate.
    turns = [turn if config["sliding_window"] is None or window is not None else None for window in windows]
    return decoder(config, norm, attention={"norm": norm}, block=_NORMS_AFTER, windows=windows, rotations=turns)


def _complete_cohere2(config: Mapping) -> dict:
    defaults = {"logit_scale": 0.0625, "layer_norm_eps": 1e-5, "attention_bias": False, "tie_word_embeddings": True}
    whole = defaults | {"sliding_window": 4096} | dict(config)
    if whole.get("layer_types") is None:
        whole["layer_types"] = _every_fourth_full(whole, whole.get("sliding_window_pattern", 4))
    return whole


def _check_cohere2(config: Mapping) -> None:
    check_derived_head_dim(config)
    expect(config, use_qk_norm=(False, None))


def _cohere2(config: Mapping) -> Description:
    bias, windows, turn = bool(config["attention_bias"]), windows_of(config), rotation(config, interleaved=True)
    return decoder(
        config,
        _layer_norm(config, bias=False),
        attention={"bias": bias, "out_bias": bias},
        block={"parallel": True, "before_mlp": None},
        windows=windows,
        rotations=[None if window is None else turn for window in windows],
        logit_scale=config["logit_scale"],
    )


def _check_stablelm(config: Mapping) -> None:
    check_derived_head_dim(config)
    if config["qk_layernorm"]:
        refuse(config, "qk_layernorm", "a norm of each head's own is not supported")


def _stablelm(config: Mapping) -> Description:
    parallel = bool(config["use_parallel_residual"])
    return decoder(
        config,
        _layer_norm(config),
        attention={"bias": bool(config["use_qkv_bias"])},
        block={"parallel": True, "before_mlp": None} if parallel else {},
        rotations=rotation(config, partial=True),
    )


def _starcoder2(config: Mapping) -> Description:
    bias = bool(config["use_bias"])
    return decoder(
        config,
        _layer_norm(config, "norm_epsilon"),
        attention={"bias": bias, "out_bias": bias},
        mlp={"gate": None, "up": "c_fc", "down": "c_proj", "bias": bias},
        windows=config["sliding_window"],
    )


def _nemotron(config: Mapping) -> Description:
    bias = bool(config["attention_bias"])
    return decoder(
        config,
        _layer_norm(config, "norm_eps", offset=1.0),
        attention={"bias": bias, "out_bias": bias},
        mlp=_NO_GATE | {"bias": bool(config["mlp_bias"])},
        rotations=rotation(config, partial=True),
    )


def _arcee(config: Mapping) -> Description:
    bias = bool(config["attention_bias"])
    return decoder(
        config,
        rms(config),
        attention={"bias": bias, "out_bias": bias},
        mlp=_NO_GATE | {"bias": bool(config["mlp_bias"])},
    )


_APERTUS_ROPE = dict(
    rope_type="llama3", factor=8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
)


def _complete_apertus(config: Mapping) -> dict:
    whole = {"attention_bias": False, "tie_word_embeddings": False, "hidden_act": "xielu"}
    whole |= {"rms_norm_eps": 1e-5, "rope_theta": 12_000_000.0} | dict(config)
    if not (whole.get("rope_scaling") or whole.get("rope_parameters")):
        whole["rope_parameters"] = {"rope_theta": 12_000_000.0} | _APERTUS_ROPE
    return whole


def _apertus(config: Mapping) -> Description:
    norm, bias = rms(config), bool(config["attention_bias"])
    return decoder(
        config,
        norm,
        attention={"bias": bias, "out_bias": bias, "norm": norm},
        mlp=_NO_GATE,
        block={"before_attention": "attention_layernorm", "before_mlp": "feedforward_layernorm"},
    )


_BIASES = dict(attention_bias=False, mlp_bias=False)
_UNTIED = dict(tie_word_embeddings=False)

FAMILIES = {
    "phi3": Family(check=_check_phi3, complete=_complete_phi3, general=_phi3),
    "phi": Family(
        complete=with_defaults(layer_norm_eps=1e-5, qk_layernorm=False, partial_rotary_factor=0.5, **_UNTIED),
        general=_phi,
    ),
    "granite": Family(
        complete=with_defaults(
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            attention_multiplier=1.0,
            logits_scaling=1.0,
            rms_norm_eps=1e-6,
            **_BIASES,
            **_UNTIED,
        ),
        general=_granite,
    ),
    "olmo2": Family(complete=with_defaults(attention_bias=False, rms_norm_eps=1e-5, **_UNTIED), general=_olmo),
    "olmo3": Family(complete=_complete_olmo3, general=_olmo3),
    "glm4": Family(
        complete=with_defaults(
            rms_norm_eps=1.5625e-7, attention_bias=True, head_dim=128, partial_rotary_factor=0.5, **_UNTIED
        ),
        general=_glm4,
    ),
    "seed_oss": Family(
        complete=with_defaults(
            rms_norm_eps=1e-6,
            attention_bias=True,
            attention_out_bias=False,
            mlp_bias=False,
            head_dim=128,
            **_UNTIED,
        ),
        general=_seed_oss,
    ),
    "ministral3": Family(complete=_complete_ministral3, general=_ministral3),
    "hunyuan_v1_dense": Family(
        complete=with_defaults(rms_norm_eps=1e-5, attention_bias=False, **_UNTIED), general=_hunyuan
    ),
    "ernie4_5": Family(
        complete=with_defaults(
            rms_norm_eps=1e-5, use_bias=False, head_dim=128, tie_word_embeddings=True, rope_theta=500_000.0
        ),
        general=_ernie,
    ),
    "exaone4": Family(complete=_complete_exaone, general=_exaone),
    "cohere2": Family(check=_check_cohere2, complete=_complete_cohere2, general=_cohere2),
    "stablelm": Family(
        check=_check_stablelm,
        complete=with_defaults(
            use_qkv_bias=False,
            qk_layernorm=False,
            use_parallel_residual=False,
            layer_norm_eps=1e-5,
            partial_rotary_factor=0.25,
            **_UNTIED,
        ),
        general=_stablelm,
    ),
    "starcoder2": Family(
        complete=with_defaults(use_bias=True, norm_epsilon=1e-5, sliding_window=None, tie_word_embeddings=True),
        general=_starcoder2,
    ),
    "nemotron": Family(
        complete=with_defaults(norm_eps=1e-5, hidden_act="relu2", partial_rotary_factor=0.5, **_BIASES, **_UNTIED),
        general=_nemotron,
    ),
    "arcee": Family(
        complete=with_defaults(rms_norm_eps=1e-5, hidden_act="relu2", **_BIASES, **_UNTIED), general=_arcee
    ),
    "apertus": Family(complete=_complete_apertus, general=_apertus),
    "internlm3": Family(complete=with_defaults(rms_norm_eps=1e-5, head_dim=128, **_BIASES, **_UNTIED), general=llama),
}
