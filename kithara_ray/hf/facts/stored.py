"""Tensors that a checkpoint may hold in another form than one tensor of that name: MXFP4, and experts in one tensor.

    E  experts    I  width inside an expert    D  hidden width

transformers saves each expert's tensors, `<mlp>.experts.<number>.gate_proj.weight` (I, D), `up_proj` and `down_proj`.
The published files of qwen3_5_moe hold `<mlp>.experts.gate_up_proj` (E, 2 * I, D) and `down_proj` (E, D, I) of all.
"""

import re

import numpy as np

from kithara_ray.hf import mxfp4
from kithara_ray.hf.checkpoint import BaseCheckpoint

_EXPERT = re.compile(r"^(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


def names_of(base: BaseCheckpoint, name: str) -> tuple[str, ...]:
    """Return the tensors of the checkpoint that hold `name`."""
    return (whole[0],) if (whole := _whole(base, name)) else mxfp4.names_of(base, name)


def view(base: BaseCheckpoint, name: str) -> np.ndarray | mxfp4.Packed:
    """Return the tensor. Slicing it reads only the slice."""
    whole = _whole(base, name)
    if whole is None:
        return mxfp4.view(base, name)
    tensor, expert, rows = whole
    return base.view(tensor)[expert][rows]


def shape_of(base: BaseCheckpoint, name: str) -> tuple[int, ...]:
    """Return the tensor's shape from headers only."""
    whole = _whole(base, name)
    if whole is None:
        return mxfp4.shape_of(base, name)
    tensor, expert, rows = whole
    experts, height, width = base.info(tensor).shape
    return (len(range(*rows.indices(height))), width) if expert < experts else ()


def _whole(base: BaseCheckpoint, name: str) -> tuple[str, int, slice] | None:
    """The tensor of all experts that holds `name`, the expert's number and its rows; None if `name` is stored so."""
    match = None if name in base.tensors else _EXPERT.match(name)
    if match is None:
        return None
    experts, number, part = match[1], int(match[2]), match[3]
    tensor = f"{experts}.down_proj" if part == "down" else f"{experts}.gate_up_proj"
    if tensor not in base.tensors or len(base.tensors[tensor].shape) != 3:
        return None
    inner = base.tensors[tensor].shape[1] // 2
    rows = {"gate": slice(inner), "up": slice(inner, None), "down": slice(None)}[part]
    return tensor, number, rows
