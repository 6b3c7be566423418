"""A base with rows for added tokens, as after transformers' `resize_token_embeddings`.

transformers draws a new row at random around the mean of the old ones. Here it is the mean, so every host makes the
same base. An adapter's file may give other values for the new rows.

Each host writes the larger tables once, into its cache. All other tensors stay in the base's own files.

    V  rows of the base    N  rows after resizing    D  hidden width
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf.checkpoint import BaseCheckpoint, TensorInfo
from kithara_ray.hf.fetch import fetch_tensors
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.safetensors_file import read_header, write_blocks
from kithara_ray.hf.tied_head import HEAD, embedding_of
from kithara_ray.hf.tower import renamed, text_of
from kithara_ray.storage.urls import cache_dir

__all__ = ["described", "resized", "rows_of", "table_arrays", "tables_of", "with_vocabulary"]

log = logging.getLogger(__name__)

HEAD_BIAS = HEAD.removesuffix("weight") + "bias"
BLOCK_ELEMENTS = 1 << 22  # 32 MiB of float64


def tables_of(base: BaseCheckpoint) -> dict[str, TensorInfo]:
    """Return the tensors that have a row for each token: the embedding, and the head's weight and bias."""
    names = (embedding_of(base.config), HEAD, HEAD_BIAS)
    return {name: base.tensors[name] for name in names if name in base.tensors}


def rows_of(base: BaseCheckpoint) -> int:
    """Return the number of rows of the embedding. Raises UnsupportedError if the base has none of the known name."""
    name = embedding_of(base.config)
    if name not in base.tensors:
        raise UnsupportedError(
            f"resize_token_embeddings: {base.source or base.directory} has no {name}; resize it with transformers"
        )
    return base.tensors[name].shape[0]


def check_rows(base: BaseCheckpoint, rows: int) -> None:
    """Check that the base can be given this many rows.

    Raises:
        ConfigError: it has more.
        UnsupportedError: other tables have a row for each token.
    """
    known = rows_of(base)
    if rows < known:
        raise ConfigError(
            f"resize_token_embeddings={rows}: the base has {known} rows, which are enough; leave it out. "
            "Rows are only added, never removed"
        )
    if text_of(base.config).get("hidden_size_per_layer_input"):
        raise UnsupportedError(
            "resize_token_embeddings: each block of this model has embeddings of its own, to which transformers adds "
            "no rows; leave it out, and use tokens of the base"
        )


def described(base: BaseCheckpoint, lora: LoraConfig | None) -> BaseCheckpoint:
    """Return the resized base with its config and the shapes of its tensors. The tables' bytes cannot be read."""
    if lora is None or (rows := lora.resize_token_embeddings) is None or base.original is not None:
        return base
    check_rows(base, rows)
    made = dict(base.tensors)
    for name, info in tables_of(base).items():
        nbytes, nowhere = info.nbytes // info.shape[0] * rows, Path("not written", info.file.name)
        made[name] = dataclasses.replace(info, file=nowhere, shape=(rows, *info.shape[1:]), nbytes=nbytes)
    return BaseCheckpoint(
        base.directory, with_vocabulary(base.config, rows), made, base.files, base.source, original=base
    )


def resized(base: BaseCheckpoint, lora: LoraConfig | None) -> BaseCheckpoint:
    """Return the resized base, whose tensors can be read. The base itself must be local.

    Raises:
        ConfigError, UnsupportedError: see `check_rows`.
    """
    if lora is None or (rows := lora.resize_token_embeddings) is None or base.original is not None:
        return base
    tensors = dict(base.tensors) | _written(base, lora)
    files = tuple(sorted({info.file for info in tensors.values()}))
    return BaseCheckpoint(
        base.directory, with_vocabulary(base.config, rows), tensors, files, base.source, original=base
    )


def table_arrays(base: BaseCheckpoint, lora: LoraConfig) -> dict[str, np.ndarray]:
    """Return the larger tables as read-only arrays over a file. For a base at a URL, this fetches only its tables."""
    original = base.original or base
    infos = _written(original, lora)
    files = tuple(sorted({info.file for info in infos.values()}))
    tables = BaseCheckpoint(original.directory, original.config, infos, files)
    return {name: tables.view(name) for name in infos}


def with_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a config.json with this vocabulary."""
    made, text = dict(config), config.get("text_config")
    if isinstance(text, Mapping):
        made["text_config"] = {**text, "vocab_size": rows}
    if not isinstance(text, Mapping) or "vocab_size" in made:
        made["vocab_size"] = rows
    return made


# --- the file of a host ----------------------------------------------------------------------------------------------


def _written(base: BaseCheckpoint, lora: LoraConfig) -> dict[str, TensorInfo]:
    """Return the larger tables in this host's cache; write them if they are not there.

    A table keeps the name of the weight file that it comes from.
    """
    rows = lora.resize_token_embeddings
    assert rows is not None
    check_rows(base, rows)
    old = tables_of(base)
    target = cache_dir() / "resized" / _key(base, old, lora)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
            made, fetched = Path(scratch, "made"), Path(scratch, "fetched")
            made.mkdir()
            fetched.mkdir()
            _write(_local(base, old, fetched), rows, lora, made)
            try:
                os.rename(made, target)
            except OSError:  # another process of this host was first: it wrote the same bytes
                shutil.rmtree(made)
        log.info("resized the vocabulary: rows=%d to rows=%d directory=%s", rows_of(base), rows, target)
    found: dict[str, TensorInfo] = {}
    for file in sorted(target.iterdir()):
        found |= renamed(base.config, read_header(file)[0])
    return found


def _key(base: BaseCheckpoint, old: Mapping[str, TensorInfo], lora: LoraConfig) -> str:
    what: list[object] = [lora.resize_token_embeddings, lora.added_rows.digest if lora.added_rows else None]
    for name, info in sorted(old.items()):
        what.append([name, info.stored, info.dtype, info.shape, info.offset])
        # The directory of a base at a URL is named by the content there.
        stat = info.file.stat()
        what.append([str(info.file.resolve()), stat.st_size, None if base.source else stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _local(base: BaseCheckpoint, old: Mapping[str, TensorInfo], directory: Path) -> BaseCheckpoint:
    """Return a checkpoint of only the tables, on this host."""
    part = base.only(old)
    if base.source is None:
        return part
    for file in part.files:
        spans = [(i.offset, i.offset + i.nbytes) for i in part.in_file_order() if i.file == file]
        fetch_tensors(base.source, file.name, directory, spans)
    return part.moved(directory)


def _write(tables: BaseCheckpoint, rows: int, lora: LoraConfig, directory: Path) -> None:
    given = lora.added_rows.values if lora.added_rows else {}
    for file in tables.files:
        part = tables.part(file)
        infos = part.in_file_order()
        entries = [(info.stored, info.dtype, (rows, *info.shape[1:])) for info in infos]
        blocks = (block for info in infos for block in _blocks(part.view(info.name), rows, given.get(info.name)))
        write_blocks(directory / file.name, entries, blocks, read_header(file)[1])


def _blocks(old: np.ndarray, rows: int, given: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield the old rows, then the new ones."""
    yield from _parts(old)
    if given is None:
        given = np.repeat(_mean(old)[None], rows - len(old), axis=0)
    yield given.astype(old.dtype)


def _mean(old: np.ndarray) -> np.ndarray:
    """Return the mean row in float32, summed in float64."""
    total = np.zeros(old.shape[1:], np.float64)
    for part in _parts(old):
        total += part.astype(np.float64).sum(axis=0)
    return (total / len(old)).astype(np.float32)


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, BLOCK_ELEMENTS // max(1, array[:1].size))
    for begin in range(0, len(array), step):
        yield array[begin : begin + step]
