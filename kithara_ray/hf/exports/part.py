"""One weight file of an export, written and proven by any process on any host: the unit of a distributed merge.

A pickled part holds the headers and the factors for its file, a few megabytes. The weights go in blocks from the base
to the destination through the process that runs the part. They never pass through the process that made it.
"""

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from kithara_ray.errors import ConfigError, ExportError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import SINGLE, BaseCheckpoint
from kithara_ray.hf.exports.proof import prove_file
from kithara_ray.hf.fetch import fetch_tensors
from kithara_ray.hf.merging.merge import Dtype, check_dtype, out_bytes, write_tensors
from kithara_ray.hf.publish import publish
from kithara_ray.storage import urls
from kithara_ray.storage.scratch import scratch

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SPARE_BYTES = 64 << 20
FILES_AT_ONCE = 2


@dataclass(frozen=True)
class Part:
    """The order to write one weight file.

    base: the tensors of the file. adapter: the modules to merge into them; None copies or casts.
    name: the file's name. target: the directory or URL of the file.
    dtype: as in `export`, or a safetensors tag per tensor.
    check_finite: refuse a NaN or an infinity in a written weight, whatever its origin.
    """

    base: BaseCheckpoint
    adapter: Adapter | None
    name: str
    target: str
    dtype: Dtype
    check_finite: bool = False

    @property
    def runs_anywhere(self) -> bool:
        """True if it needs no directory of this host."""
        return self.base.source is not None and urls.is_url(self.target)

    @property
    def out_bytes(self) -> int:
        """The size of the written tensors in bytes."""
        tag = check_dtype(self.dtype)
        return sum(out_bytes(info, tag) for info in self.base.tensors.values())


@dataclass(frozen=True)
class Written:
    """The record of a weight file that was written and proven.

    file: its size and SHA-256. counts: see `prove_file`. digests: of the base's tensors, for its fingerprint.
    receipt: the destination's own record of the file, see `publish.put_file`.
    """

    name: str
    file: dict[str, object]
    counts: dict[str, int]
    digests: dict[str, bytes]
    receipt: dict[str, object] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """Return the record as plain data, without the name."""
        hexadecimal = {tensor: digest.hex() for tensor, digest in self.digests.items()}
        return {"file": self.file, "counts": self.counts, "digests": hexadecimal, "receipt": self.receipt}

    @classmethod
    def of(cls, name: str, record: Mapping[str, dict]) -> "Written":
        digests = {tensor: bytes.fromhex(digest) for tensor, digest in record["digests"].items()}
        return cls(name, record["file"], record["counts"], digests, record["receipt"])


def parse_size(size: int | str) -> int:
    """Convert 5_000_000_000, "5GB" or "500 MiB" to bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if not match or match[2] not in UNITS or not float(match[1]) * UNITS[match[2]] >= 1:
        raise ConfigError(f'max_shard_size must be bytes or text like "5GB" or "500MB", got {size!r}')
    return int(float(match[1]) * UNITS[match[2]])


def files_of(base: BaseCheckpoint, dtype: str = "auto", max_shard_bytes: int | None = None) -> dict[str, str]:
    """Map each tensor of an export to its weight file, in the order of the tensors in the files.

    The files are the base's own, or new ones of up to `max_shard_bytes` of tensors. A larger tensor has its own file.
    """
    infos = base.in_file_order()
    if max_shard_bytes is None:
        return {info.name: info.file.name for info in infos}
    tag, numbers, number, filled = check_dtype(dtype), {}, 1, 0
    for info in infos:
        size_bytes = out_bytes(info, tag)
        if filled and filled + size_bytes > max_shard_bytes:
            number, filled = number + 1, 0
        numbers[info.name] = number
        filled += size_bytes
    if number == 1:
        return dict.fromkeys(numbers, SINGLE)
    return {name: f"model-{which:05d}-of-{number:05d}.safetensors" for name, which in numbers.items()}


def parts_of(
    base: BaseCheckpoint,
    adapter: Adapter | None,
    target: str,
    dtype: Dtype,
    files: Mapping[str, str],
    check_finite: bool = False,
) -> list[Part]:
    """Make one part per weight file of `files_of`. Check first that the adapter fits."""
    names: dict[str, list[str]] = {}
    for tensor, file in files.items():
        names.setdefault(file, []).append(tensor)
    parts = []
    for file, tensors in names.items():
        part = base.only(tensors)
        merged = adapter.of_tensors(part.tensors) if adapter else None
        parts.append(Part(part, merged, file, target, dtype, check_finite))
    return parts


def write_part(part: Part) -> Written:
    """Fetch (from a URL), merge, prove, digest and put (to a URL) a weight file.

    It may run again, even while an earlier run goes on: it puts the same bytes. Raises CheckpointError, ExportError,
    DestinationError.
    """
    base, is_remote = part.base, urls.is_url(part.target)
    with scratch() as temporary:
        _check_room(part, temporary)
        if base.source:
            directory = temporary / "base"
            directory.mkdir()
            base = fetch_part(base, directory)
        directory = temporary if is_remote else Path(part.target)
        file = directory / (part.name if is_remote else f".{part.name}.{uuid.uuid4().hex[:8]}")
        try:
            write_tensors(base, part.adapter, file, part.dtype)
            with contextlib.nullcontext() if is_remote else _syncing(file):
                counts, sha256 = prove_file(file, base, part.adapter, check_dtype(part.dtype), part.check_finite)
            described: dict[str, object] = {"bytes": file.stat().st_size, "sha256": sha256}
            receipt: dict[str, object] = {}
            if is_remote:
                receipt = publish.put_file(file, part.target, part.name)
            else:
                os.replace(file, directory / part.name)
        finally:
            file.unlink(missing_ok=True)
        return Written(part.name, described, counts, base.digests(), receipt)


@contextlib.contextmanager
def _syncing(file: Path) -> Generator[None]:
    """Write the file to the disk while the `with` block reads it from memory."""
    with file.open("rb") as stream, ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, stream.fileno())
        yield
        synced.result()


def remove_leftovers(directory: Path) -> None:
    """Remove files that killed tasks left in a local target. Call this only when no task is running."""
    for path in directory.glob(".*.safetensors.*"):
        path.unlink()


def _check_room(part: Part, temporary: Path) -> None:
    """Check the disk space: a part needs room for its whole file if one end is a URL, and twice that if both are."""
    infos = part.base.tensors.values()
    needed = sum(info.nbytes for info in infos) if part.base.source else 0
    needed += part.out_bytes if urls.is_url(part.target) else 0
    free = shutil.disk_usage(temporary).free
    if needed and needed + SPARE_BYTES > free:
        raise ExportError(
            f"{part.name}: {needed:,} bytes of temporary files are needed in {tempfile.gettempdir()} of this host, "
            f"{free:,} are free; set TMPDIR to a larger disk, or export fewer files at a time (parallel_threads)"
        )


def fetch_part(base: BaseCheckpoint, directory: Path) -> BaseCheckpoint:
    """Fetch only the part's tensors, and nothing else of its files, from a URL into `directory`."""
    assert base.source is not None
    for file in base.files:
        spans = [(i.offset, i.offset + i.nbytes) for i in base.in_file_order() if i.file == file]
        fetch_tensors(base.source, file.name, directory, spans)
    return base.moved(directory)


def write_here(parts: Iterable[Part]) -> Iterator[Written]:
    """Write the parts in this process, two at a time: one merges while the other is proven.

    If one fails, nothing is written after this function ends.
    """
    waiting, running = deque(parts), set()
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        while waiting or running:
            while waiting and len(running) < FILES_AT_ONCE:
                running.add(pool.submit(write_part, waiting.popleft()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
