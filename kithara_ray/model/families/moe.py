"""Corrections for the mixtures of experts mixtral, qwen2_moe and qwen3_moe.

KerasHub computes every expert for every token and weights the results, most of them by 0. The sum equals transformers',
at the cost of all experts; `blocks.mixtures` replaces this on a TPU. A token's experts depend only on that token, so
padding changes nothing.
"""

from collections.abc import Mapping

from kithara_ray.errors import UnsupportedError
from kithara_ray.model import keras_compat
from kithara_ray.model.families.family import (
    Family,
    check_derived_head_dim,
    check_rope,
    expect,
    refuse,
    with_defaults,
)

_ABSENT = (False, None)


def check_routing(config: Mapping) -> None:
    experts = config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]
    if not 1 <= config["num_experts_per_tok"] <= experts:
        refuse(config, "num_experts_per_tok", f"there are {experts} experts")


# Families whose routers' auxiliary loss, transformers' `load_balancing_loss_func`, is computed here.
_WITH_ROUTER_LOSS = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "gpt_oss",
)  # fmt: skip


def check_router_loss(config: Mapping) -> None:
    """Check that the auxiliary loss of a model's routers is known here.

    Raises:
        UnsupportedError: it is not; the message lists the families.
    """
    if config.get("model_type") not in _WITH_ROUTER_LOSS:
        raise UnsupportedError(
            f"router_aux_loss_coef: {config.get('model_type')} has no routers whose auxiliary loss is known here, "
            f"{', '.join(_WITH_ROUTER_LOSS)} have; leave the argument out"
        )


def route_in_float32(router) -> None:
    """Compute the router's softmax in float32, as transformers does.

    In bfloat16 many experts' probabilities are equal, and chance would decide which are chosen.
    """
    import keras

    router.dtype_policy = keras.DTypePolicy("float32")


# --- mixtral ---------------------------------------------------------------------------------------------------------


def _check_mixtral(config: Mapping) -> None:
    # KerasHub's mixtral always has a separate head.
    expect(config, hidden_act=("silu",), tie_word_embeddings=_ABSENT)
    check_routing(config)
    check_derived_head_dim(config)
    check_rope(config, "default")


def _correct_mixtral(config: Mapping, kwargs: dict) -> None:
    # A block that also returned its router's logits would return a tuple.
    kwargs["output_router_logits"] = False


def _finish_mixtral(config: Mapping, backbone) -> None:
    for block in backbone.transformer_layers:
        route_in_float32(keras_compat.router_of(keras_compat.mixtral_mixture_of(block)))


# --- qwen3_moe -------------------------------------------------------------------------------------------------------


def _complete_qwen3_moe(config: Mapping) -> dict:
    """Fill in defaults, and two fields that transformers 5 may omit.

    It writes `num_local_experts` instead of `num_experts`, and no `head_dim` if that is hidden/heads.
    """
    defaults = dict(
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        use_sliding_window=False,
        sliding_window=4096,
        norm_topk_prob=False,
    )
    whole = defaults | dict(decoder_sparse_step=1, router_aux_loss_coef=0.001) | dict(config)
    whole["mlp_only_layers"] = whole.get("mlp_only_layers") or []
    for name, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if name not in whole:
            whole[name] = whole.get(other, 128)
    if not whole["use_sliding_window"]:
        whole["sliding_window"] = None
    if whole.get("head_dim") is None and "hidden_size" in whole:
        whole["head_dim"] = whole["hidden_size"] // whole["num_attention_heads"]
    return whole


def _check_qwen3_moe(config: Mapping) -> None:
    expect(config, hidden_act=("silu",), attention_bias=_ABSENT)
    check_routing(config)
    check_rope(config, "default")
    if config.get("use_sliding_window") and config.get("sliding_window"):
        refuse(config, "use_sliding_window", "KerasHub forgets the window where it decodes with a cache")


def _correct_qwen3_moe(config: Mapping, kwargs: dict) -> None:
    kwargs["mlp_only_layers"] = config["mlp_only_layers"]


def _finish_qwen3_moe(config: Mapping, backbone) -> None:
    for layer in keras_compat.all_layers(backbone):
        # The norms of queries and keys keep their default epsilon.
        if type(layer).__name__ == "Qwen3MoeLayerNorm":
            layer.epsilon = config["rms_norm_eps"]
    for block in backbone.transformer_layers:
        if block.is_sparse_mlp:
            route_in_float32(keras_compat.router_of(block.mlp))
        else:
            keras_compat.expose_dense_mlp(block)


# --- qwen2_moe -------------------------------------------------------------------------------------------------------


def _complete_qwen2_moe(config: Mapping) -> dict:
    defaults = dict(tie_word_embeddings=False, use_sliding_window=False, sliding_window=4096, norm_topk_prob=False)
    whole = defaults | dict(max_window_layers=28, decoder_sparse_step=1, num_experts=60, qkv_bias=True) | dict(config)
    whole = dict(output_router_logits=False, router_aux_loss_coef=0.001, rms_norm_eps=1e-6) | whole
    # No block has a dense MLP of this width, and KerasHub's converter asks for it.
    whole.setdefault("intermediate_size", 5632)
    whole["mlp_only_layers"] = whole.get("mlp_only_layers") or []
    if not whole["use_sliding_window"]:
        whole["sliding_window"] = 0
    return whole


def _check_qwen2_moe(config: Mapping) -> None:
    # KerasHub's backbone makes all blocks as it makes the first.
    expect(config, hidden_act=("silu",), qkv_bias=(True,), decoder_sparse_step=(1,), mlp_only_layers=([],))
    check_routing(config)
    check_derived_head_dim(config)
    check_rope(config, "default")
    if config["use_sliding_window"]:
        refuse(config, "use_sliding_window", "KerasHub has no sliding window on a part of the blocks")
    if "sliding_attention" in (config.get("layer_types") or ()):
        refuse(config, "layer_types", "without use_sliding_window, transformers' window is 0 tokens")


def _correct_qwen2_moe(config: Mapping, kwargs: dict) -> None:
    # The converter leaves the tied head out; a block that also returned its router's logits would return a tuple.
    kwargs |= dict(tie_word_embeddings=config["tie_word_embeddings"], output_router_logits=False)


def _finish_qwen2_moe(config: Mapping, backbone) -> None:
    for block in backbone.transformer_layers:
        route_in_float32(keras_compat.router_of(block.mlp))


FAMILIES = {
    "qwen2_moe": Family(
        "convert_qwen_moe",
        "QwenMoeCausalLM",
        _check_qwen2_moe,
        _correct_qwen2_moe,
        _finish_qwen2_moe,
        complete=_complete_qwen2_moe,
    ),
    "mixtral": Family(
        "convert_mixtral",
        "MixtralCausalLM",
        _check_mixtral,
        _correct_mixtral,
        _finish_mixtral,
        complete=with_defaults(
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            sliding_window=None,
            output_router_logits=False,
            rope_theta=1_000_000.0,
        ),
    ),
    "qwen3_moe": Family(
        "convert_qwen3_moe",
        "Qwen3MoeCausalLM",
        _check_qwen3_moe,
        _correct_qwen3_moe,
        _finish_qwen3_moe,
        complete=_complete_qwen3_moe,
    ),
}
