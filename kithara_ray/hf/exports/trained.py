"""Write trained weights as a Hugging Face model, slice by slice as they arrive.

A slice is a box of one tensor and goes to its place in its file. When a file is complete, the writer reads it back and
compares every box with its sender's checksum. It never holds a whole tensor.
"""

import logging
import math
import threading
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kithara_ray.errors import ExportError
from kithara_ray.hf.checkpoint import BaseCheckpoint, TensorInfo
from kithara_ray.hf.fetch import fetch
from kithara_ray.hf.merging.merge import CAST_TAGS, FLOAT_TAGS, row_blocks, written_metadata
from kithara_ray.hf.safetensors_file import NUMPY_DTYPES, pack_header, raw_bytes, read_header
from kithara_ray.hf.tied_head import HEAD, embedding_of
from kithara_ray.hf.tower import renamed

log = logging.getLogger(__name__)

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TensorSlice:
    """A box of one tensor.

    Attributes:
        name: the tensor's name.
        shape: the tensor's shape, in which dims may be split further: (N, H, D) for (N * H, D).
        bounds: (start, stop) in each dim of `shape`.
        data: the box.
        rank: the process that held it.
        checksum: `checksum` of the data, computed by the sender.
    """

    name: str
    shape: tuple[int, ...]
    bounds: Bounds
    data: np.ndarray
    rank: int
    checksum: int


def checksum(data: np.ndarray) -> int:
    """Return the checksum of an array's bytes, row-major."""
    return zlib.crc32(raw_bytes(data))


@dataclass
class _File:
    """One weight file that is being filled.

    Attributes:
        mapped: the bytes of the file; None once it is complete.
        missing: the number of elements that have not arrived.
        arrived: (tensor, shape, bounds, checksum, rank) of every slice that has arrived.
    """

    mapped: np.memmap | None
    infos: dict[str, TensorInfo]
    missing: int
    arrived: list[tuple[str, tuple[int, ...], Bounds, int, int]] = field(default_factory=list)


class TrainedWriter:
    """A writer of a base's weight files with trained values in place of the base's; several threads may fill it.

    Args:
        base: names, shapes and files; and the values of untrained tensors.
        trained: names of the tensors that will arrive. If the file has a tensor for a tied head, it is written together
        with the embedding.
        dtype: of the values that will arrive, "float32" or "bfloat16".
        directory: the directory for the files.
        complete: called with each file once it is complete and proven.
    """

    def __init__(
        self,
        base: BaseCheckpoint,
        trained: Collection[str],
        dtype: str,
        directory: Path,
        complete: Callable[[Path], None] = lambda path: None,
    ):
        if base.source and not set(base.names) <= {*trained, HEAD}:
            base = BaseCheckpoint.open(fetch(base.source))
        self._tag, self._trained, self._complete = CAST_TAGS[dtype], set(trained), complete
        self._config = base.config
        self._lock = threading.Lock()
        self._files: dict[Path, _File] = {}
        self._file_of: dict[str, Path] = {}
        self._same: dict[str, tuple[str, ...]] = {}
        if HEAD in base.tensors and HEAD not in self._trained:
            embedding = embedding_of(base.config)
            if base.tensors[HEAD].shape == base.tensors[embedding].shape:
                self._same[embedding] = (HEAD,)
        expected = self._trained.union(*self._same.values())
        for file in base.files:
            self._create(base.part(file), expected, Path(directory, file.name))

    def _create(self, part: BaseCheckpoint, expected: set[str], path: Path) -> None:
        """Create a file of its full size with its header and the untrained values."""
        infos = sorted(part.tensors.values(), key=lambda info: (info.offset, info.nbytes))
        tags = [self._tag if i.name in expected and i.dtype in FLOAT_TAGS else i.dtype for i in infos]
        entries = [(info.stored, tag, info.shape) for info, tag in zip(infos, tags, strict=True)]
        header = pack_header(entries, written_metadata([read_header(part.files[0])[1]]))
        size = sum(math.prod(shape) * NUMPY_DTYPES[tag].itemsize for _, tag, shape in entries)
        with path.open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + size)
        written = renamed(part.config, read_header(path)[0])
        mapped = np.memmap(path, np.uint8, "r+")
        missing = 0
        for info in infos:
            if info.name in expected:
                self._file_of[info.name] = path
                missing += math.prod(info.shape)
                continue
            own = _array(mapped, written[info.name]).reshape(info.shape[0] if info.shape else 1, -1)
            for begin, block in row_blocks(info):
                own[begin : begin + len(block)] = block
        self._files[path] = _File(mapped, written, missing)
        if not missing:
            self._finish(path)

    def put(self, part: TensorSlice) -> None:
        """Write one slice to its place.

        Raises:
            ExportError: the slice fits no tensor; or it was its file's last, and the file differs from the data sent.
        """
        if part.name not in self._trained:
            raise ExportError(f"rank {part.rank} sent {part.name}, which is no tensor of this model")
        for name in (part.name, *self._same.get(part.name, ())):
            path = self._file_of[name]
            file = self._files[path]
            if file.mapped is None:
                raise ExportError(
                    f"{name}: rank {part.rank} sent {_show(part.bounds)} of it after its file was complete"
                )
            whole = _array(file.mapped, file.infos[name])
            region = tuple(slice(*span) for span in part.bounds)
            if math.prod(part.shape) != whole.size or part.data.dtype != whole.dtype:
                raise ExportError(
                    f"{name}: rank {part.rank} sent {part.data.dtype} of a tensor {part.shape}, "
                    f"the file's is {whole.dtype} {whole.shape}"
                )
            whole.reshape(part.shape)[region] = part.data
            with self._lock:
                file.arrived.append((name, part.shape, part.bounds, part.checksum, part.rank))
                file.missing -= part.data.size
                is_last = file.missing == 0
            if is_last:
                self._finish(path)

    def _finish(self, path: Path) -> None:
        file = self._files[path]
        assert file.mapped is not None
        file.mapped.flush()
        file.mapped = None
        _check_tiled(path.name, file)
        reopened, infos = np.memmap(path, np.uint8, "r"), renamed(self._config, read_header(path)[0])
        for name, shape, bounds, expected, rank in file.arrived:
            region = tuple(slice(*span) for span in bounds)
            if checksum(_array(reopened, infos[name]).reshape(shape)[region]) != expected:
                raise ExportError(f"{path}: {name}{_show(bounds)} is not what rank {rank} sent")
        del reopened
        log.info("wrote %s: tensors=%d slices=%d", path.name, len(infos), len(file.arrived))
        self._complete(path)

    def check_complete(self, num_ranks: int) -> None:
        """Check that everything has arrived from `num_ranks` ranks.

        Raises:
            ExportError: data is missing; the message names the file, and the ranks that sent nothing.
        """
        heard = {entry[-1] for file in self._files.values() for entry in file.arrived}
        silent = sorted(set(range(num_ranks)) - heard)
        for path, file in self._files.items():
            if file.missing:
                who = f"nothing came from rank {silent}" if silent else f"heard from ranks {sorted(heard)}"
                raise ExportError(f"{path.name}: {file.missing} elements of its tensors are missing; {who}")


def _array(mapped: np.ndarray, info: TensorInfo) -> np.ndarray:
    raw = mapped[info.offset : info.offset + info.nbytes]
    return np.ndarray(info.shape, info.numpy_dtype, buffer=raw)


def _check_tiled(filename: str, file: _File) -> None:
    """Check that no slices overlap: the number of elements is right, so without overlap they cover everything."""
    of_tensor: dict[str, list] = {}
    for name, shape, bounds, _, rank in file.arrived:
        of_tensor.setdefault(name, []).append((bounds, shape, rank))
    for name, parts in of_tensor.items():
        if len({shape for _, shape, _ in parts}) != 1:
            raise ExportError(f"{filename}: ranks sent slices of {name} by different shapes")
        parts.sort()
        for number, (bounds, _, rank) in enumerate(parts):
            for other, _, other_rank in parts[number + 1 :]:
                if other[:1] and other[0][0] >= bounds[0][1]:
                    break  # sorted by the start of the first dim
                if all(a[0] < b[1] and b[0] < a[1] for a, b in zip(bounds, other, strict=True)):
                    raise ExportError(f"{filename}: {name}{_show(other)} came twice, from rank {rank} and {other_rank}")


def _show(bounds: Bounds) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in bounds) + "]"
