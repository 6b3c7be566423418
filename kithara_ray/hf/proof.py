"""Proofs of a written export, by reading it back. Each raises ExportError naming the tensor; none repairs anything.

The merged rows are checked against float64 arithmetic, not against the code that wrote them.
Legend: O out features, I in features, R rank.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from kithara_ray.errors import AdapterError, CheckpointError, ExportError, UnsupportedError
from kithara_ray.hf.adapter import WEIGHT_SUFFIX, Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.merge import FLOAT_TAGS, cast, row_blocks
from kithara_ray.hf.safetensors_file import NUMPY_DTYPES, TensorInfo, read_header

log = logging.getLogger(__name__)

SAMPLE_ROWS = 16
UNIT_ROUNDOFF_32 = 2.0**-24


def prove_adapter(directory: Path, adapter: Adapter) -> None:
    """The adapter read back equals the one given, tensor by tensor, bit by bit, with the same scales."""
    try:
        found = Adapter.read(directory)
    except (AdapterError, UnsupportedError) as error:
        raise ExportError(f"the written adapter does not read back: {error}") from error
    if found.tensors.keys() != adapter.tensors.keys():
        names = sorted(found.tensors.keys() ^ adapter.tensors.keys())
        raise ExportError(f"{directory}: {len(names)} adapter tensors were lost or added, first {names[0]!r}")
    for name, array in adapter.tensors.items():
        if found.tensors[name].dtype != array.dtype or not _same_bits(found.tensors[name], array):
            raise ExportError(f"{directory}: adapter tensor {name!r} reads back different from the one given")
    for module in adapter.modules:
        scales = found.config.scale_of(module), adapter.config.scale_of(module)
        if scales[0] != scales[1]:
            raise ExportError(
                f"{directory}: {module} has scale {scales[0]} in the written config, expected {scales[1]}"
            )


def prove_checkpoint(directory: Path, base: BaseCheckpoint, tag: str | None) -> None:
    """The written checkpoint opens, and its headers say the base's names, shapes and (cast to `tag`, if any) dtypes."""
    try:
        written = BaseCheckpoint.open(directory)
    except CheckpointError as error:
        raise ExportError(f"the written checkpoint does not read back: {error}") from error
    _prove_headers(written.tensors, base, tag)
    moved = [n for n in base.names if written.tensors[n].file.name != base.tensors[n].file.name]
    if moved:
        raise ExportError(f"{directory}: {moved[0]} is in {written.tensors[moved[0]].file.name}, expected elsewhere")


def prove_file(written: Path, base: BaseCheckpoint, adapter: Adapter | None, tag: str | None) -> dict[str, int]:
    """One written weight file against the base's (a `part`): every tensor there, untouched ones equal bit by bit
    (after the cast to `tag`, if any), the adapter's modules equal to W + scale * B @ A, or what DoRA makes of it.
    Returns how many tensors were untouched, merged, and changed by it.
    """
    try:
        tensors, _ = read_header(written)
    except CheckpointError as error:
        raise ExportError(f"the written file does not read back: {error}") from error
    _prove_headers(tensors, base, tag)
    targets = {module + WEIGHT_SUFFIX: module for module in adapter.modules} if adapter else {}
    counts = {"untouched": 0, "merged": 0, "merged_and_changed": 0}
    for name in base.names:
        info, found = base.tensors[name], tensors[name]
        if name in targets:
            _prove_merged(info, found, adapter, targets[name])
            counts["merged"] += 1
            counts["merged_and_changed"] += not _equal_after_cast(info, found)
        elif not _equal_after_cast(info, found):
            raise ExportError(f"{name}: not a target, but its written bytes differ from the base's")
        else:
            counts["untouched"] += 1
    return counts


def _prove_headers(tensors: Mapping[str, TensorInfo], base: BaseCheckpoint, tag: str | None) -> None:
    if tensors.keys() != base.tensors.keys():
        names = sorted(tensors.keys() ^ base.tensors.keys())
        raise ExportError(f"{base.directory}: {len(names)} tensors were lost or added, first {names[0]!r}")
    for name, info in base.tensors.items():
        out_tag, found = tag if tag and info.dtype in FLOAT_TAGS else info.dtype, tensors[name]
        if (found.dtype, found.shape) != (out_tag, info.shape):
            raise ExportError(
                f"{name}: expected {out_tag} {info.shape}, the written file has {found.dtype} {found.shape}"
            )


def _equal_after_cast(info: TensorInfo, found: TensorInfo) -> bool:
    blocks = zip(row_blocks(info), row_blocks(found), strict=True)
    return all(_same_bits(cast(before, found.numpy_dtype), after) for (_, before), (_, after) in blocks)


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.array_equal(
        np.ascontiguousarray(one).reshape(-1).view(np.uint8), np.ascontiguousarray(other).reshape(-1).view(np.uint8)
    )


def _rows(info: TensorInfo, rows: np.ndarray) -> np.ndarray:
    mapped = np.memmap(info.file, np.uint8, "r")[info.offset : info.offset + info.nbytes]
    return np.ndarray(info.shape, info.numpy_dtype, buffer=mapped)[rows].astype(np.float64)


def _prove_merged(info: TensorInfo, found: TensorInfo, adapter: Adapter, module: str) -> None:
    """A sample of rows, the ones with the largest |B| among them, against float64 within the rounding of the dtypes."""
    b_OR, a_RI = adapter.b(module).astype(np.float64), adapter.a(module).astype(np.float64)
    n_out, r = b_OR.shape
    strongest = np.argsort(np.abs(b_OR).sum(axis=1))[-SAMPLE_ROWS // 2 :]
    rows = np.unique(np.concatenate([np.linspace(0, n_out - 1, SAMPLE_ROWS // 2, dtype=np.int64), strongest]))
    scale = adapter.config.scale_of(module)
    expected_OI = _rows(info, rows) + scale * (b_OR[rows] @ a_RI)
    found_OI = _rows(found, rows)
    eps = float(ml_dtypes.finfo(NUMPY_DTYPES[found.dtype]).eps)
    tiny = float(ml_dtypes.finfo(NUMPY_DTYPES[found.dtype]).smallest_subnormal)
    in_float32_OI = np.abs(b_OR[rows]) @ np.abs(a_RI) * scale * (r + 4) * UNIT_ROUNDOFF_32
    formula = "W + scale * B @ A"
    if adapter.config.use_dora:
        # A norm in float32 is off by half of what its sum of squares is, of 8 lanes; then a quotient and a product.
        norm_O1 = np.linalg.norm(expected_OI, axis=1, keepdims=True)
        factor_O1 = adapter.magnitude(module)[rows, None].astype(np.float64) / norm_O1
        off_O1 = np.linalg.norm(in_float32_OI, axis=1, keepdims=True) / norm_O1
        off_O1 += (expected_OI.shape[1] / 16 + 8) * UNIT_ROUNDOFF_32
        expected_OI = factor_O1 * expected_OI
        in_float32_OI = np.abs(factor_O1) * in_float32_OI + off_O1 * np.abs(expected_OI)
        formula = "magnitude * (W + scale * B @ A) / its norm"
    allowed_OI = 0.5 * eps * np.abs(expected_OI) * 1.01 + 2 * UNIT_ROUNDOFF_32 * np.abs(expected_OI)
    allowed_OI += in_float32_OI * (1 + eps) + tiny
    wrong = ~(np.abs(found_OI - expected_OI) <= allowed_OI)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ExportError(
            f"{info.name}[{rows[row]}, {column}]: the written file holds {found_OI[row, column]!r}, "
            f"{formula} is {expected_OI[row, column]!r}; {wrong.sum()} of {wrong.size} sampled values are off"
        )
