"""The safetensors layout: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes.

This is our own code because the merge patches files at absolute byte offsets, and writes headers before it streams
casts.
Rules (https://github.com/huggingface/safetensors#format): offsets are relative to the end of the header, tensors MUST
cover the data section without holes or overlaps, names MUST be unique, `__metadata__` MUST map strings to strings.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from kithara_ray.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

NUMPY_DTYPES: Mapping[str, np.dtype] = {
    tag: np.dtype(dtype)
    for tag, dtype in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
        "BOOL": np.bool_, "C64": np.complex64,
    }.items()
}  # fmt: skip
TAGS: Mapping[np.dtype, str] = {dtype: tag for tag, dtype in NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """The place of one tensor.

    name: the tensor's name in transformers' model. stored: its name in the file, which may be an older one; see
    `tower.renamed`. dtype: the safetensors tag. offset: the absolute byte offset in `file`.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stored: str = ""

    def __post_init__(self):
        object.__setattr__(self, "stored", self.stored or self.name)

    @property
    def numpy_dtype(self) -> np.dtype:
        return NUMPY_DTYPES[self.dtype]

    def matrix(self, number: int) -> "TensorInfo":
        """Return the place of one matrix of a tensor of three dims; a tensor of fewer dims is one matrix."""
        if len(self.shape) < 3:
            return self
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + number * nbytes, nbytes=nbytes)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the tensors (in file order) and the metadata of one file. Raises CheckpointError for every malformation."""
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{path}: {size_bytes} bytes is too short for a safetensors file; fetch it again")
        header_bytes = int.from_bytes(start, "little")
        if header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise CheckpointError(
                f"{path}: header length {header_bytes} exceeds the file ({size_bytes} bytes) or the limit "
                f"of {MAX_HEADER_BYTES}; the file is truncated or not safetensors, fetch it again"
            )
        raw = stream.read(header_bytes)
    header = _parse_json(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings, found {metadata!r}")
    infos = [_entry(path, name, entry, 8 + header_bytes, size_bytes) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_cover(path, infos, 8 + header_bytes, size_bytes)
    return {info.name: info for info in infos}, metadata


def _parse_json(path: Path, raw: bytes) -> dict:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        names = [name for name, _ in pairs]
        for name in set(names):
            if names.count(name) > 1:
                raise CheckpointError(f"{path}: the header names {name!r} twice; the file is malformed, fetch it again")
        return dict(pairs)

    def unique_fast(pairs: list[tuple[str, object]]) -> dict:
        built = dict(pairs)
        return built if len(built) == len(pairs) else unique(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_fast)
    except (ValueError, RecursionError) as error:  # not Unicode, not JSON, or a number with thousands of digits
        raise CheckpointError(f"{path}: the header is not JSON ({error}); fetch the file again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a {type(header).__name__}, not an object; fetch the file again")
    return header


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, entry: object, data_start: int, size_bytes: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {entry!r}")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(tag, str) or tag not in NUMPY_DTYPES:
        raise CheckpointError(f"{where}: dtype {tag!r} is not one of {', '.join(NUMPY_DTYPES)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where}: data_offsets {offsets!r} is not a pair of non-negative integers")
    begin, end = offsets
    if begin > end or data_start + end > size_bytes:
        raise CheckpointError(
            f"{where}: data_offsets {offsets} do not lie within the {size_bytes - data_start} data bytes; "
            "the file is truncated, fetch it again"
        )
    expected_bytes = math.prod(shape) * NUMPY_DTYPES[tag].itemsize
    if end - begin != expected_bytes:
        raise CheckpointError(f"{where}: {tag} {shape} needs {expected_bytes} bytes, data_offsets hold {end - begin}")
    return TensorInfo(name, path, tag, tuple(shape), data_start + begin, end - begin)


def _check_cover(path: Path, infos: list[TensorInfo], data_start: int, size_bytes: int) -> None:
    position, previous = data_start, "the header"
    for info in infos:
        if info.offset < position:
            raise CheckpointError(f"{path}: tensor {info.name!r} overlaps {previous!r}; fetch the file again")
        if info.offset > position:
            raise CheckpointError(f"{path}: {info.offset - position} bytes before {info.name!r} belong to no tensor")
        position, previous = info.offset + info.nbytes, info.name
    if position != size_bytes:
        raise CheckpointError(f"{path}: {size_bytes - position} bytes at the end belong to no tensor; fetch it again")


def pack_header(entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Build length and header for consecutive (name, tag, shape), padded so that data starts at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tag, shape in entries:
        end = position + math.prod(shape) * NUMPY_DTYPES[tag].itemsize
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_array(info: TensorInfo) -> np.ndarray:
    """Read a private copy of one whole tensor."""
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        raw = stream.read(info.nbytes)
    return np.frombuffer(bytearray(raw), dtype=info.numpy_dtype).reshape(info.shape)


def map_array(info: TensorInfo) -> np.ndarray:
    """Map one whole tensor for reading; a slice touches only the pages it needs."""
    mapped = np.memmap(info.file, np.uint8, "r")[info.offset : info.offset + info.nbytes]
    return np.ndarray(info.shape, info.numpy_dtype, buffer=mapped)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write whole arrays in the library's own order: wider dtypes first (alignment), then by name."""
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    with path.open("wb") as stream:
        stream.write(pack_header(((n, TAGS[arrays[n].dtype], arrays[n].shape) for n in names), metadata))
        for name in names:
            stream.write(raw_bytes(arrays[name]))


def write_blocks(
    path: Path,
    entries: list[tuple[str, str, tuple[int, ...]]],
    blocks: Iterator[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors whose bytes arrive in order as arrays of any size."""
    with path.open("wb") as stream:
        stream.write(pack_header(entries, metadata))
        for block in blocks:
            stream.write(raw_bytes(block))


def raw_bytes(array: np.ndarray) -> memoryview:
    """Return an array's bytes, row-major, as a view of it if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
