"""Prove a written export by reading it back. Each proof raises ExportError naming the tensor; none repairs anything.

The merged rows are checked against float64 arithmetic, not against the code that wrote them.
Legend: O out features, I in features, R rank.
"""

import hashlib
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from kithara_ray.errors import AdapterError, CheckpointError, ExportError, UnsupportedError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.experts import is_transposed
from kithara_ray.hf.merging.changes import Change, Factors, changes_of, factors_of
from kithara_ray.hf.merging.merge import FLOAT_TAGS, Tag, cast, out_tag, row_blocks
from kithara_ray.hf.resizing.saved import tensor_of
from kithara_ray.hf.safetensors_file import NUMPY_DTYPES, TensorInfo, map_array, read_header
from kithara_ray.hf.tower import renamed

log = logging.getLogger(__name__)

SAMPLE_ROWS = 16
HASH_AHEAD = 8  # blocks that wait to be hashed
BLOCK_BYTES = 1 << 20
UNIT_ROUNDOFF_32 = 2.0**-24


def prove_adapter(directory: Path, adapter: Adapter, tables: Mapping[str, np.ndarray]) -> None:
    """Prove that the adapter read back equals the given one, tensor by tensor, bit by bit, with the same scales.

    tables: the resized base's tables that were written with it.
    """
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
    expected = {tensor_of(name): array for name, array in tables.items()}
    if found.tables.keys() != expected.keys():
        raise ExportError(f"{directory}: the file holds the tables {sorted(found.tables)}, not {sorted(expected)}")
    for name, array in expected.items():
        if not _same_bits(map_array(found.tables[name]), array):
            raise ExportError(f"{directory}: {name} of the resized base reads back different from the one given")
    for module in adapter.modules:
        scales = found.config.scale_of(module), adapter.config.scale_of(module)
        if scales[0] != scales[1]:
            raise ExportError(
                f"{directory}: {module} has scale {scales[0]} in the written config, expected {scales[1]}"
            )


def prove_checkpoint(directory: Path, base: BaseCheckpoint, tag: Tag, files: Mapping[str, str] | None = None) -> None:
    """Prove that the written checkpoint opens with the base's names, shapes and (cast to `tag`, if any) dtypes.

    files: tensor -> weight file, if they are not the base's.
    """
    try:
        written = BaseCheckpoint.open(directory)
    except CheckpointError as error:
        raise ExportError(f"the written checkpoint does not read back: {error}") from error
    _prove_headers(written.tensors, base, tag)
    files = {name: info.file.name for name, info in base.tensors.items()} if files is None else files
    moved = [n for n in base.names if written.tensors[n].file.name != files[n]]
    if moved:
        raise ExportError(f"{directory}: {moved[0]} is in {written.tensors[moved[0]].file.name}, expected elsewhere")


def prove_file(
    written: Path, base: BaseCheckpoint, adapter: Adapter | None, tag: Tag, check_finite: bool = False
) -> tuple[dict[str, int], str]:
    """Prove one written weight file against the base's (a `part`), reading it once.

    Every tensor must be there. Untouched tensors must equal the base bit by bit (after the cast to `tag`, if any). The
    adapter's modules must equal W + scale * B @ A, or DoRA's result.

    Returns the numbers of tensors untouched, merged, and changed by the merge, and the file's SHA-256.
    """
    try:
        tensors = renamed(base.config, read_header(written)[0])
    except CheckpointError as error:
        raise ExportError(f"the written file does not read back: {error}") from error
    _prove_headers(tensors, base, tag)
    changes = changes_of(adapter, base.tensors)
    counts = {"untouched": 0, "merged": 0, "merged_and_changed": 0}
    with _Hasher() as hasher:
        hasher.add_header(written)
        for found in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
            info = base.tensors[found.name]
            is_equal = _read_and_compare(info, found, hasher, check_finite)
            if found.name in changes:
                change = changes[found.name]
                assert adapter is not None  # the change is its own
                if change.module is None:
                    _prove_replaced(info, found, change)
                else:
                    for number, own in enumerate(factors_of(adapter, change, is_transposed(base.config))):
                        _prove_merged(info.matrix(number), found.matrix(number), own)
                counts["merged"] += 1
                counts["merged_and_changed"] += not is_equal
            elif not is_equal:
                raise ExportError(f"{found.name}: not a target, but its written bytes differ from the base's")
            else:
                counts["untouched"] += 1
        return counts, hasher.hexdigest()


class _Hasher:
    """SHA-256 of blocks in order, in a separate thread from the one that reads and compares them."""

    def __init__(self):
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future] = deque()

    def __enter__(self) -> "_Hasher":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def add(self, block: bytes | bytearray | memoryview) -> None:
        """Hash one more block, which must not change afterwards."""
        while len(self._pending) >= HASH_AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._sha256.update, block))

    def add_header(self, file: Path) -> None:
        with file.open("rb") as stream:
            length = stream.read(8)
            self.add(length + stream.read(int.from_bytes(length, "little")))

    def hexdigest(self) -> str:
        while self._pending:
            self._pending.popleft().result()
        return self._sha256.hexdigest()


def _read_and_compare(info: TensorInfo, found: TensorInfo, hasher: _Hasher, check_finite: bool) -> bool:
    """True if the written tensor equals the base's after the cast; this hashes every block that it reads."""
    is_equal, position, size = True, 0, max(1, math.prod(found.shape[1:]))
    blocks = _raw_pairs(info, found) if info.dtype == found.dtype else _cast_pairs(info, found)
    for before, after in blocks:
        hasher.add(after.view(np.uint8).data)
        is_equal = is_equal and _same_bits(before, after)
        if check_finite and found.dtype in FLOAT_TAGS and not np.isfinite(after).all():
            row = (position + int(np.flatnonzero(~np.isfinite(after))[0])) // size
            raise ExportError(f"{found.name}: row {row} of the written tensor holds a NaN or an infinity")
        position += after.size
    return is_equal


def _raw_pairs(info: TensorInfo, found: TensorInfo) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the same elements of both, flat.

    A written block is a private copy. The next block of the base overwrites the one before.
    """
    dtype, base_block = info.numpy_dtype, np.empty(min(info.nbytes, BLOCK_BYTES), np.uint8)
    with info.file.open("rb", buffering=0) as base, found.file.open("rb", buffering=0) as written:
        base.seek(info.offset)
        written.seek(found.offset)
        for begin in range(0, info.nbytes, BLOCK_BYTES):
            n = min(BLOCK_BYTES, info.nbytes - begin)
            written_block = np.empty(n, np.uint8)
            for stream, block in ((base, base_block[:n]), (written, written_block)):
                if stream.readinto(block.data) != n:
                    raise ExportError(f"{stream.name}: ended within {info.name!r}; it changed under the export")
            yield base_block[:n].view(dtype), written_block.view(dtype)


def _cast_pairs(info: TensorInfo, found: TensorInfo) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for (_, before), (_, after) in zip(row_blocks(info), row_blocks(found), strict=True):
        yield cast(before, found.numpy_dtype).reshape(-1), after.reshape(-1)


def _prove_headers(tensors: Mapping[str, TensorInfo], base: BaseCheckpoint, tag: Tag) -> None:
    if tensors.keys() != base.tensors.keys():
        names = sorted(tensors.keys() ^ base.tensors.keys())
        raise ExportError(f"{base.directory}: {len(names)} tensors were lost or added, first {names[0]!r}")
    for name, info in base.tensors.items():
        expected, found = out_tag(info, tag), tensors[name]
        if (found.dtype, found.shape) != (expected, info.shape):
            raise ExportError(
                f"{name}: expected {expected} {info.shape}, the written file has {found.dtype} {found.shape}"
            )


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one_8, other_8 = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    whole = one_8.size // 8 * 8  # words compare faster than bytes
    return np.array_equal(one_8[:whole].view(np.uint64), other_8[:whole].view(np.uint64)) and np.array_equal(
        one_8[whole:], other_8[whole:]
    )


def _rows(info: TensorInfo, rows: np.ndarray) -> np.ndarray:
    return map_array(info)[rows].astype(np.float64)


def _prove_replaced(info: TensorInfo, found: TensorInfo, change: Change) -> None:
    """Prove every element against float64: the adapter's value if it has one, else the base's, plus any added bias."""
    eps = float(ml_dtypes.finfo(NUMPY_DTYPES[found.dtype]).eps)
    tiny = float(ml_dtypes.finfo(NUMPY_DTYPES[found.dtype]).smallest_subnormal)
    own = range(info.shape[0]) if change.rows is None else change.rows
    value = change.value
    row_of = {row: number for number, row in enumerate(own)} if value is not None else {}
    for (begin, before), (_, after) in zip(row_blocks(info), row_blocks(found), strict=True):
        expected, found_64 = before.astype(np.float64), after.astype(np.float64)
        replaced = [row for row in range(begin, begin + len(before)) if row in row_of]
        for row in replaced:
            assert value is not None
            expected[row - begin] = value[row_of[row]]
        allowed = 0.51 * eps * np.abs(expected) + tiny
        if change.added is None:
            kept = np.setdiff1d(np.arange(len(before)), np.array(replaced, np.int64) - begin)
            expected[kept], allowed[kept] = cast(before[kept], found.numpy_dtype), 0
        if change.added is not None:
            added = change.added[begin : begin + len(before), None].astype(np.float64) * change.scale
            # Roundings: the value, then the added array, the product, and the sum.
            allowed = allowed + 0.51 * eps * np.abs(expected + added) + 2 * UNIT_ROUNDOFF_32 * np.abs(added)
            expected = expected + added
        wrong = ~(np.abs(found_64 - expected) <= allowed)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ExportError(
                f"{info.name}[{begin + row}, {column}]: the written file holds {found_64[row, column]!r}, "
                f"the adapter's value is {expected[row, column]!r}; {wrong.sum()} of {wrong.size} values are off"
            )


def _prove_merged(info: TensorInfo, found: TensorInfo, own: Factors) -> None:
    """Prove a sample of rows, including those with the largest |B|, against float64 within the dtypes' rounding."""
    b_OR, a_RI = own.left_OR.astype(np.float64), own.right_RI.astype(np.float64)
    n_out, r = b_OR.shape
    strongest = np.argsort(np.abs(b_OR).sum(axis=1))[-SAMPLE_ROWS // 2 :]
    rows = np.unique(np.concatenate([np.linspace(0, n_out - 1, SAMPLE_ROWS // 2, dtype=np.int64), strongest]))
    added_OI = own.scale * (b_OR[rows] @ a_RI)
    expected_OI = _rows(info, rows) + added_OI
    found_OI = _rows(found, rows)
    eps = float(ml_dtypes.finfo(NUMPY_DTYPES[found.dtype]).eps)
    tiny = float(ml_dtypes.finfo(NUMPY_DTYPES[found.dtype]).smallest_subnormal)
    in_float32_OI = np.abs(b_OR[rows]) @ np.abs(a_RI) * own.scale * (r + 4) * UNIT_ROUNDOFF_32
    formula = "W + scale * B @ A"
    if own.magnitude_O is not None:
        # A float32 norm has half the error of its sum of squares in 8 lanes; a quotient and a product add theirs.
        norm_O1 = np.linalg.norm(expected_OI, axis=1, keepdims=True)
        factor_O1 = own.magnitude_O[rows, None].astype(np.float64) / norm_O1
        off_O1 = np.linalg.norm(in_float32_OI, axis=1, keepdims=True) / norm_O1
        off_O1 += (expected_OI.shape[1] / 16 + 8) * UNIT_ROUNDOFF_32
        expected_OI = factor_O1 * expected_OI
        in_float32_OI = np.abs(factor_O1) * in_float32_OI + off_O1 * np.abs(expected_OI)
        formula = "magnitude * (W + scale * B @ A) / its norm"
    allowed_OI = 0.5 * eps * np.abs(expected_OI) * 1.01 + 2 * UNIT_ROUNDOFF_32 * np.abs(expected_OI)
    allowed_OI += in_float32_OI * (1 + eps) + tiny
    if own.rounds:
        allowed_OI += 0.51 * eps * np.abs(added_OI) + tiny
    wrong = ~(np.abs(found_OI - expected_OI) <= allowed_OI)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ExportError(
            f"{info.name}[{rows[row]}, {column}]: the written file holds {found_OI[row, column]!r}, "
            f"{formula} is {expected_OI[row, column]!r}; {wrong.sum()} of {wrong.size} sampled values are off"
        )
