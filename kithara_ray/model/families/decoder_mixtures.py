"""Mixtures of experts that KerasHub has no converter for, as decoders of ours."""

import dataclasses
from collections.abc import Mapping, Sequence

from kithara_ray.model.decoder.description import Description, Experts, Mlp
from kithara_ray.model.families.family import Family, expect, refuse
from kithara_ray.model.families.general import decoder, rms, rotation


def _with_experts(
    description: Description, experts: Experts, sparse: Sequence[bool], module: str = "mlp"
) -> Description:
    """The description with these experts in the blocks that are sparse."""
    blocks = [
        dataclasses.replace(block, mlp=experts, mlp_name=module) if is_sparse else block
        for block, is_sparse in zip(description.blocks, sparse, strict=True)
    ]
    return dataclasses.replace(description, blocks=tuple(blocks))


def _check_choice(config: Mapping, chosen: str, count: str) -> None:
    if not 1 <= config[chosen] <= config[count]:
        refuse(config, chosen, f"there are {config[count]} experts")


# --- ernie4_5_moe ----------------------------------------------------------------------------------------------------

# Other names of two fields; transformers prefers them.
_ERNIE_NAMES = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}


def _complete_ernie(config: Mapping) -> dict:
    whole = {"rms_norm_eps": 1e-5, "use_bias": False, "tie_word_embeddings": True, "rope_theta": 500_000.0, "moe_k": 6}
    whole |= {"moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_layer_start_index": 1}
    whole |= {"moe_layer_end_index": -1, "moe_layer_interval": 1, "moe_norm_min": 1e-12} | dict(config)
    whole |= {own: whole[other] for other, own in _ERNIE_NAMES.items() if other in whole}
    if whole["moe_layer_end_index"] == -1:
        whole["moe_layer_end_index"] = whole["num_hidden_layers"] - 1
    return whole


def _ernie(config: Mapping) -> Description:
    bias, shared, width = bool(config["use_bias"]), config["moe_num_shared_experts"], config["moe_intermediate_size"]
    dense = decoder(
        config,
        rms(config),
        attention={"bias": bias, "out_bias": bias},
        mlp={"bias": bias},
        rotations=rotation(config, interleaved=True),
        head_bias=bias,
    )
    count, activation = config["moe_num_experts"], config["hidden_act"]
    experts = Experts(
        count,
        config["moe_k"],
        width,
        activation,
        "softmax",
        "moe_statics.e_score_correction_bias",
        (1, count),
        floor=config["moe_norm_min"],
        shared=Mlp(width * shared, activation, bias) if shared else None,
    )
    first, last, step = (config[f"moe_layer_{name}"] for name in ("start_index", "end_index", "interval"))
    sparse = [(n + 1) % step == 0 and first <= n <= last for n in range(config["num_hidden_layers"])]
    return _with_experts(dense, experts, sparse)


# --- glm4_moe --------------------------------------------------------------------------------------------------------


def _complete_glm(config: Mapping) -> dict:
    whole = {
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.5,
        "norm_topk_prob": True,
    }
    whole |= {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1}
    whole |= {"n_shared_experts": 1, "n_routed_experts": 128, "num_experts_per_tok": 8}
    return whole | {"tie_word_embeddings": False} | dict(config)


def _check_glm(config: Mapping) -> None:
    expect(config, n_group=(1,), topk_group=(1,))
    _check_choice(config, "num_experts_per_tok", "n_routed_experts")


def _glm(config: Mapping) -> Description:
    norm, width, activation = rms(config), config["moe_intermediate_size"], config["hidden_act"]
    attention = {"bias": bool(config["attention_bias"]), "norm": norm if config["use_qk_norm"] else None}
    dense = decoder(config, norm, attention=attention, rotations=rotation(config, partial=True))
    count = config["n_routed_experts"]
    experts = Experts(
        count,
        config["num_experts_per_tok"],
        width,
        activation,
        "sigmoid",
        "gate.e_score_correction_bias",
        (count,),
        normalised=bool(config["norm_topk_prob"]),
        floor=1e-20,
        factor=config["routed_scaling_factor"],
        shared=Mlp(width * config["n_shared_experts"], activation),
    )
    sparse = [number >= config["first_k_dense_replace"] for number in range(config["num_hidden_layers"])]
    return _with_experts(dense, experts, sparse)


# --- minimax_m2 ------------------------------------------------------------------------------------------------------


def _complete_minimax(config: Mapping) -> dict:
    whole = {"rope_theta": 5_000_000.0, "head_dim": 128, "num_experts_per_tok": 8, "num_local_experts": 256}
    whole |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | dict(config)
    if whole.get("rotary_dim") is not None:
        whole.setdefault("partial_rotary_factor", whole["rotary_dim"] / whole["head_dim"])
    return whole


def _check_minimax(config: Mapping) -> None:
    _check_choice(config, "num_experts_per_tok", "num_local_experts")


def _minimax(config: Mapping) -> Description:
    norm, count = rms(config), config["num_local_experts"]
    attention = {"norm": norm, "norm_whole": True}
    dense = decoder(config, norm, attention=attention, rotations=rotation(config, partial=True))
    experts = Experts(
        count,
        config["num_experts_per_tok"],
        config["intermediate_size"],
        config["hidden_act"],
        "sigmoid",
        "e_score_correction_bias",
        (count,),
        gate="w1",
        up="w3",
        down="w2",
    )
    return _with_experts(dense, experts, [True] * config["num_hidden_layers"], "block_sparse_moe")


FAMILIES = {
    "ernie4_5_moe": Family(
        check=lambda config: _check_choice(config, "moe_k", "moe_num_experts"),
        complete=_complete_ernie,
        general=_ernie,
    ),
    "glm4_moe": Family(check=_check_glm, complete=_complete_glm, general=_glm),
    "minimax_m2": Family(check=_check_minimax, complete=_complete_minimax, general=_minimax),
}
