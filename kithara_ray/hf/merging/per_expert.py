"""An adapter of experts with a module for each expert's matrix, as servers read it that know no packed factors.

    E  experts    R  rank    I  width inside an expert    D  hidden width

The update of an expert's gate and up projection is B (2I, R) @ A (R, D). Its first half of rows is the gate's, so both
matrices get the same A, and each its half of B. The update stays the same to the bit.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from kithara_ray.errors import UnsupportedError
from kithara_ray.hf.adapter import A_SUFFIX, B_SUFFIX, Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.experts import is_parameter, is_router, part_of, targets_of
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.merging.changes import Change, factors_of

_WEIGHT = ".weight"


def per_expert(adapter: Adapter, base: BaseCheckpoint) -> Adapter:
    """Return the adapter with a module for each expert's matrix, named as the base's file names it.

    An adapter without experts is returned as it is.

    Raises:
        UnsupportedError: the base's file holds all experts in one tensor, or matrices have different scales.
    """
    if not any(map(is_parameter, adapter.modules)):
        return adapter
    config, tensors, scales = adapter.config, {}, {}
    for name in base.names:
        module = next((target for target in targets_of(name) if target in adapter.modules), None)
        if module is None or not name.endswith(_WEIGHT):
            continue
        part = part_of(name) if is_parameter(module) else None
        if part is not None and part.expert is None:
            continue
        (own,) = factors_of(adapter, Change(module, part), transposed=False)
        stored = name.removesuffix(_WEIGHT)
        tensors[stored + A_SUFFIX] = np.ascontiguousarray(own.right_RI)
        tensors[stored + B_SUFFIX] = np.ascontiguousarray(own.left_OR)
        scales[stored] = own.scale
    held = {part.parameter for name in base.names if (part := part_of(name)) and part.expert is not None}
    if not held.issuperset(filter(is_parameter, adapter.modules)):
        raise UnsupportedError(
            f"experts='per_expert': the files of this {base.config.get('model_type')} model hold all experts in one "
            "tensor, and their servers read packed factors; leave it out"
        )
    if len(set(scales.values())) > 1:
        raise UnsupportedError(
            f"experts='per_expert': modules have the scales {sorted(set(scales.values()))}, and a server reads one; "
            "train with one alpha / rank, or serve the merged layout"
        )
    made = _config(config, tensors, next(iter(scales.values())))
    return dataclasses.replace(adapter, config=made, tensors=tensors | adapter.beside)


def _config(config: LoraConfig, tensors: Mapping[str, np.ndarray], scale: float) -> LoraConfig:
    """The config whose r is the largest rank, at the same scale; other ranks are patterns."""
    ranks = {name.removesuffix(A_SUFFIX): len(array) for name, array in tensors.items() if name.endswith(A_SUFFIX)}
    rank = max(ranks.values())
    leaves: dict[str, set[int]] = {}
    for module, found in ranks.items():
        leaves.setdefault(module.rpartition(".")[2], set()).add(found)
    others: dict[str, int] = {}
    for module, found in ranks.items():
        leaf = module.rpartition(".")[2]
        if found != rank:
            # PEFT matches a router's parameter, and others its module.
            behind = r"(\.weight)?" if is_router(module) else ""
            others[(leaf if len(leaves[leaf]) == 1 else re.escape(module)) + behind] = found
    power = 0.5 if config.use_rslora else 1
    return dataclasses.replace(
        config,
        r=rank,
        lora_alpha=scale * rank**power,
        target_modules=tuple(sorted(leaves)),
        target_parameters=(),
        exclude_modules=None,
        rank_pattern=others,
        alpha_pattern={key: scale * found**power for key, found in others.items()},
    )
