"""Corrections for gpt_oss. Its experts are read from MXFP4, as published, or from float tensors."""

from collections.abc import Mapping
from typing import Any

from kithara_ray.model.decoder.rope import yarn_range
from kithara_ray.model.families.family import Family, expect, refuse
from kithara_ray.model.families.moe import check_routing, route_in_float32

_ROPE = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096
)


def _complete(config: Mapping) -> dict:
    defaults = dict(rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=True, sliding_window=128, head_dim=64)
    whole: dict[str, Any] = {**defaults, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, **config}
    theta = whole.get("rope_theta", 150_000.0)
    given = dict(whole.pop("rope_scaling", None) or whole.get("rope_parameters") or _ROPE)
    whole["rope_parameters"] = {"rope_theta": theta} | given
    if whole.get("layer_types") is None:
        kinds = ("sliding_attention", "full_attention")
        whole["layer_types"] = [kinds[i % 2] for i in range(whole["num_hidden_layers"])]
    return whole


def _check(config: Mapping) -> None:
    expect(config, hidden_act=("silu",), attention_bias=(True,), tie_word_embeddings=(False, None))
    check_routing(config)
    rope = config["rope_parameters"]
    if rope["rope_type"] not in ("yarn", "default"):
        refuse(config, "rope_parameters", f"rope type {rope['rope_type']!r} is dropped by KerasHub's gpt_oss")
    for name in ("attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor"):
        if rope.get(name) is not None:
            refuse(config, "rope_parameters", f"KerasHub has no {name}")
    if rope["rope_type"] == "yarn":
        low, high = yarn_range(rope, config["head_dim"], rope["original_max_position_embeddings"])
        if high < low or rope["factor"] < 1:
            why = "KerasHub's yarn differs for an original_max_position_embeddings this small, or a factor below 1"
            refuse(config, "rope_parameters", why)
    if config["sliding_window"] is not None and config["sliding_window"] < 2:
        refuse(config, "sliding_window", "KerasHub takes a window of one token for none")


def _correct(config: Mapping, kwargs: dict) -> None:
    # A block that also returned its router's logits would return a tuple.
    kwargs["output_router_logits"] = False


def _finish(config: Mapping, backbone) -> None:
    rope = config["rope_parameters"]
    for block, kind in zip(backbone.transformer_layers, config["layer_types"], strict=True):
        attention, moe = block.self_attention_layer, block.sparse_moe_block
        # KerasHub hardcodes a window for every second block, starting with the second.
        block.sliding_window = config["sliding_window"] if kind == "sliding_attention" else None
        # When KerasHub decodes with a cache, its windows hold one token more than stated.
        attention.sliding_window = None if block.sliding_window is None else block.sliding_window - 1
        rotary = attention.rotary_embedding_layer
        rotary.rope_type, rotary.scaling_factor = "linear", 1.0
        if rope["rope_type"] == "yarn":
            # KerasHub hardcodes all of these but the factor, which it reads from a place transformers 5 leaves empty.
            rotary.rope_type, rotary.scaling_factor = "yarn", rope["factor"]
            rotary.beta_fast, rotary.beta_slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
            rotary.original_max_position_embeddings = rope["original_max_position_embeddings"]
            rotary.truncate = rope.get("truncate", True)
        moe.experts.alpha, moe.experts.limit = config["swiglu_alpha"], config["swiglu_limit"]
        route_in_float32(moe.router.router_dense)
        _scores_as_given(moe.router)


def _scores_as_given(router) -> None:
    """Cast scores to the dtype of the router's input, because the experts' outputs are multiplied by them."""
    import keras

    original = router.call
    router.call = lambda hidden_states: keras.ops.cast(original(hidden_states), hidden_states.dtype)


FAMILIES = {
    "gpt_oss": Family(
        "convert_gpt_oss",
        "GptOssCausalLM",
        _check,
        _correct,
        _finish,
        complete=_complete,
        quantisations=("mxfp4",),
    )
}
