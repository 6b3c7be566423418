"""A merge by itself, without the staging and the proofs of an export."""

from pathlib import Path

from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.merging.merge import check_mergeable, write_config, write_tensors


def merge(base: BaseCheckpoint, adapter: Adapter, directory: Path, dtype: str = "auto") -> tuple[Path, ...]:
    """All files of `base` with `adapter` merged in, into a directory that is there; returns what was written."""
    check_mergeable(base, adapter, dtype)
    files = [merge_file(base, adapter, file, directory, dtype) for file in base.files]
    return (*files, *write_config(base, directory, dtype))


def merge_file(base: BaseCheckpoint, adapter: Adapter | None, file: Path, directory: Path, dtype: str = "auto") -> Path:
    return write_tensors(base.part(file), adapter, directory / file.name, dtype)
