"""One weight file of an export, written and proven by any process on any host: the unit of a distributed merge.

A part is pickled with the headers and the factors that concern its file, a few megabytes; the weights go from the base
to the destination through the process that runs it, in blocks, and never through the one that made it.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kithara_ray.hf import publish, storage
from kithara_ray.hf.adapter import WEIGHT_SUFFIX, Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.merge import check_dtype, merge_file
from kithara_ray.hf.proof import prove_file


@dataclass(frozen=True)
class Part:
    """What is to be written: one weight file.

    base: that file of the base. adapter: the modules of it that are merged in; None copies or casts.
    target: the directory or URL that the file goes to. dtype: as of `export`, or a safetensors tag a tensor.
    """

    base: BaseCheckpoint
    adapter: Adapter | None
    target: str
    dtype: str | Mapping[str, str]

    @property
    def runs_anywhere(self) -> bool:
        """Whether it needs no directory of this host."""
        return self.base.source is not None and storage.is_url(self.target)


@dataclass(frozen=True)
class Written:
    """What was written and proven. counts: see `prove_file`. digests: of the base's tensors, for its fingerprint."""

    name: str
    file: dict[str, object]
    counts: dict[str, int]
    digests: dict[str, bytes]


def parts_of(base: BaseCheckpoint, adapter: Adapter | None, target: str, dtype: str | Mapping[str, str]) -> list[Part]:
    """One part a weight file. The caller has checked that the adapter fits."""
    parts = []
    for file in base.files:
        part = base.part(file)
        targets = [m for m in adapter.modules if m + WEIGHT_SUFFIX in part.tensors] if adapter else []
        parts.append(Part(part, adapter.only(targets) if targets else None, target, dtype))
    return parts


def write_part(part: Part) -> Written:
    """Fetch (from a URL), merge, prove, digest and put (to a URL). Raises CheckpointError, ExportError,
    DestinationError. May be run again: it writes the same bytes."""
    with tempfile.TemporaryDirectory(prefix="kithara_ray_part_") as scratch:
        base = part.base
        if base.source:
            downloaded = Path(scratch, "base")
            downloaded.mkdir()
            base = base.moved(storage.fetch_file(base.source, base.files[0].name, downloaded))
        remote = storage.is_url(part.target)
        file = merge_file(base, part.adapter, base.files[0], Path(scratch if remote else part.target), part.dtype)
        counts = prove_file(file, base, part.adapter, check_dtype(part.dtype))
        written = Written(file.name, digest(file), counts, base.digests())
        if remote:
            publish.put_file(file, storage.join(part.target, file.name))
    return written


def write_serially(parts: Iterable[Part]) -> Iterator[Written]:
    """In this process, one after another."""
    return map(write_part, parts)


def digest(path: Path) -> dict[str, object]:
    """Size and SHA-256 of a file, as a report names them."""
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
