"""Merge an adapter (base + scale * B @ A, or DoRA) file by file: copy each weight file, then patch the merged bytes.

A merge never holds a whole tensor: it needs memory for a few blocks of MERGE_ELEMENTS. A file is the unit of work
(`write_tensors`), so several processes can merge files into one directory. delta.py holds the arithmetic, which is
identical to PEFT's.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from kithara_ray.errors import ConfigError, ExportError, UnsupportedError
from kithara_ray.hf import beside
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import CONFIG, INDEX, SINGLE, BaseCheckpoint, TensorInfo, read_json
from kithara_ray.hf.facts.experts import is_parameter, is_transposed
from kithara_ray.hf.merging.changes import Change, changes_of, factors_of
from kithara_ray.hf.merging.delta import dora_rows, merged_rows
from kithara_ray.hf.safetensors_file import NUMPY_DTYPES, raw_bytes, read_header, write_blocks
from kithara_ray.hf.tied_head import HEAD, is_tied

log = logging.getLogger(__name__)

MERGE_ELEMENTS = 1 << 20  # a block and its float32 temporaries: about 32 MiB
CAST_TAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FLOAT_TAGS = ("F64", "F32", "BF16", "F16")
MERGE_TAGS = ("F32", "BF16", "F16")
HEAD_WEIGHT = "lm_head.weight"
# "auto", a dtype of CAST_TAGS, or a safetensors tag per tensor; and what `check_dtype` makes of it.
Dtype: TypeAlias = str | Mapping[str, str]
Tag: TypeAlias = str | Mapping[str, str] | None
_COPY_BYTES = 1 << 30


def check_dtype(dtype: Dtype) -> Tag:
    """Return the safetensors tag for "float32", "bfloat16" or "float16"; None for "auto". Raises ConfigError.

    A mapping gives every tensor its own tag, and is returned as it is.
    """
    if isinstance(dtype, Mapping):
        return dtype
    if dtype != "auto" and dtype not in CAST_TAGS:
        raise ConfigError(f'dtype must be "auto", "float32", "bfloat16" or "float16", got {dtype!r}')
    return CAST_TAGS.get(dtype)


def check_mergeable(base: BaseCheckpoint, adapter: Adapter, dtype: str = "auto") -> None:
    """Refuse a merge that is impossible or wrong, without reading weights. Raises AdapterError or UnsupportedError."""
    # Only experts are in MXFP4. Without factors of theirs they are copied as they are, but not cast.
    copied = check_dtype(dtype) is None and not any(map(is_parameter, adapter.modules))
    refuse_quantized(base, but=("mxfp4",) if copied else ())
    adapter.validate(base)
    changes = changes_of(adapter, base.tensors)
    for name, change in changes.items():
        if change.module is None:
            continue
        info = base.tensors[name]
        if info.dtype not in MERGE_TAGS:
            raise UnsupportedError(
                f"{info.name}: a {info.dtype} weight cannot be merged into; export the adapter alone, "
                "or start from the float32, bfloat16 or float16 checkpoint"
            )
        _refuse_embedding(base, change.module)
    for name in changes:
        if name not in base.tensors:
            raise UnsupportedError(
                f"{name}: the base has no such bias that lora_bias could be merged into, as PEFT has it; export the "
                "adapter alone, or train without lora_bias"
            )
        if base.tensors[name].dtype not in MERGE_TAGS:
            raise UnsupportedError(f"{name}: a {base.tensors[name].dtype} tensor cannot be merged into")
    if beside.is_tied(base) and HEAD_WEIGHT in base.tensors and any(c.value is not None for c in changes.values()):
        _refuse_second_head(adapter)


def _refuse_second_head(adapter: Adapter) -> None:
    if adapter.config.modules_to_save or adapter.config.trainable_token_indices:
        raise UnsupportedError(
            f"{HEAD_WEIGHT}: config.json ties it to the embedding, but the checkpoint holds a second copy, which a "
            "merge would not change; rewrite the base with transformers' save_pretrained"
        )


def refuse_quantized(base: BaseCheckpoint, but: Collection[str] = ()) -> None:
    """Refuse a base with quantised weights by config.json, except by the methods in `but`. Raises UnsupportedError."""
    configs = [base.config, *(value for value in base.config.values() if isinstance(value, dict))]
    quantized = next((c["quantization_config"] for c in configs if c.get("quantization_config")), None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        if method in but:
            return
        raise UnsupportedError(
            f"{base.directory}: quantization_config ({method}) in {CONFIG}: a quantised base cannot be merged or "
            "cast; export the adapter alone, or start from the unquantised checkpoint"
        )


def _refuse_embedding(base: BaseCheckpoint, module: str) -> None:
    leaf = module.rpartition(".")[2]
    tied = is_tied(base.config) or HEAD not in base.tensors
    if leaf in ("embed_tokens", "wte", "word_embeddings"):
        raise UnsupportedError(
            f"{module}: adapters on the token embedding cannot be merged; leave it out of the targets"
        )
    if leaf == "lm_head" and tied:
        raise UnsupportedError(
            f"{module}: its weight is tied to the token embedding (tie_word_embeddings), so a merge would change the "
            "embedding too; leave it out of target_modules"
        )


def write_config(
    base: BaseCheckpoint, directory: Path, dtype: str = "auto", files: Mapping[str, str] | None = None
) -> tuple[Path, ...]:
    """Write config.json and, for a sharded checkpoint, the index of the weight files; copy either if nothing changes.

    files: tensor -> weight file, if they are not the base's.
    """
    directory, tag = Path(directory), check_dtype(dtype)
    written = [directory / CONFIG]
    is_copy = tag is None and base.original is None
    if is_copy:
        shutil.copyfile(base.directory / CONFIG, directory / CONFIG)
    else:
        write_json(directory / CONFIG, base.config if tag is None else _with_dtype(base.config, dtype, top=True))
    theirs = {name: info.file.name for name, info in base.tensors.items()}
    files = theirs if files is None else dict(files)
    has_index = (base.directory / INDEX).is_file()
    if has_index and is_copy and files == theirs:
        written.append(directory / INDEX)
        shutil.copyfile(base.directory / INDEX, directory / INDEX)
    elif set(files.values()) != {SINGLE}:
        written.append(directory / INDEX)
        index = read_json(base.directory / INDEX) if has_index else {}
        total_bytes = sum(out_bytes(info, tag) for info in base.tensors.values())
        metadata = {**(index.get("metadata") or {}), "total_size": total_bytes}
        weight_map = {base.tensors[name].stored: file for name, file in files.items()}
        write_json(directory / INDEX, {**index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return tuple(written)


def out_bytes(info: TensorInfo, tag: Tag) -> int:
    """Return the bytes that a tensor takes once it is written, cast to `tag`, if any."""
    return math.prod(info.shape) * NUMPY_DTYPES[out_tag(info, tag)].itemsize


def write_tensors(base: BaseCheckpoint, adapter: Adapter | None, target: Path, dtype: Dtype = "auto") -> Path:
    """Write all tensors of `base` as one weight file, merging the adapter's modules.

    `base` may be part of a checkpoint. A file of the base that stays as it is gets copied and patched; any other file
    is written tensor by tensor.

    Call check_mergeable first. dtype "auto" keeps each tensor's dtype and is bit-identical to PEFT's merge_and_unload
    on a CPU. Any other dtype casts all floating tensors; merged tensors are added in float32 and rounded once. Raises
    ExportError for values that overflow.
    """
    tag = check_dtype(dtype)
    infos = base.in_file_order()
    changes = changes_of(adapter, base.tensors)
    merged = [info for info in infos if info.name in changes]
    headers = [read_header(file) for file in base.files]
    is_whole = len(headers) == 1 and headers[0][0].keys() == {info.stored for info in infos}
    if is_whole and all(out_tag(info, tag) == info.dtype for info in infos):
        copy_file(base.files[0], target)
        with target.open("r+b") as stream:
            for info in merged:
                stream.seek(info.offset)
                for block in _tensor_blocks(base, info, adapter, changes[info.name], info.dtype):
                    stream.write(raw_bytes(block))
    else:
        entries = [(info.stored, out_tag(info, tag), info.shape) for info in infos]
        blocks = (b for i in infos for b in _tensor_blocks(base, i, adapter, changes.get(i.name), out_tag(i, tag)))
        write_blocks(target, entries, blocks, written_metadata(found for _, found in headers))
    log.info("wrote %s: tensors=%d merged=%d dtype=%s", target.name, len(infos), len(merged), dtype)
    return target


def written_metadata(of_files: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the metadata of a weight file that is written anew from the tensors of other files.

    Entries that the files agree on are kept. `format` makes transformers read the tensors as torch's.
    """
    of_files = list(of_files)
    kept = {"format": "pt"}
    for key in sorted({key for metadata in of_files for key in metadata}):
        values = {metadata[key] for metadata in of_files if key in metadata}
        if len(values) == 1:
            kept[key] = values.pop()
        else:
            log.warning("metadata %r differs between the base's weight files and is left out: %s", key, sorted(values))
    return kept


def out_tag(info: TensorInfo, tag: Tag) -> str:
    """Return the tag in which a tensor is written: `tag` for a floating tensor, if there is one."""
    if isinstance(tag, Mapping):
        return tag[info.name]
    return tag if tag and info.dtype in FLOAT_TAGS else info.dtype


def row_blocks(info: TensorInfo, elements: int = MERGE_ELEMENTS) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, private copy of a block of rows) in order; a tensor of fewer than two dims has one column."""
    rows, columns = (info.shape[0] if info.shape else 1), math.prod(info.shape[1:])
    step = max(1, elements // max(1, columns))
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        for begin in range(0, rows, step):
            n = min(step, rows - begin)
            raw = bytearray(n * columns * info.numpy_dtype.itemsize)
            if stream.readinto(raw) != len(raw):
                raise ExportError(f"{info.file}: ended within {info.name!r}; the base changed under the export")
            yield begin, np.frombuffer(raw, info.numpy_dtype).reshape(n, columns)


def _tensor_blocks(
    base: BaseCheckpoint, info: TensorInfo, adapter: Adapter | None, change: Change | None, tag: str
) -> Iterator[np.ndarray]:
    """Yield the tensor's rows in the dtype of `tag`, merged if there is a change."""
    out_dtype = NUMPY_DTYPES[tag]
    if change is not None and change.module is not None:
        assert adapter is not None  # the change is its own
        blocks = _merged_blocks(info, adapter, change, is_transposed(base.config), out_dtype)
    else:
        rows = row_blocks(info)
        blocks = ((w, _replaced(w, at, change, out_dtype) if change else cast(w, out_dtype)) for at, w in rows)
    for w_OI, out_OI in blocks:
        if (change is not None or out_dtype != w_OI.dtype) and info.dtype in FLOAT_TAGS:
            _check_finite(info, w_OI, out_OI, tag)
        yield out_OI


def _merged_blocks(
    info: TensorInfo, adapter: Adapter, change: Change, transposed: bool, out_dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows, merged rows) of a tensor that holds one matrix, or one for each expert."""
    for number, own in enumerate(factors_of(adapter, change, transposed)):
        for begin, w_OI in row_blocks(info.matrix(number)):
            left_OR = own.left_OR[begin : begin + len(w_OI)]
            if own.magnitude_O is not None:
                magnitude_O = own.magnitude_O[begin : begin + len(w_OI)]
                yield w_OI, dora_rows(w_OI, left_OR, own.right_RI, own.scale, magnitude_O, out_dtype)
            else:
                yield w_OI, merged_rows(w_OI, left_OR, own.right_RI, own.scale, out_dtype, own.rounds)


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round to nearest even; return the array itself if it already has that dtype."""
    with np.errstate(over="ignore"):
        return array if array.dtype == dtype else array.astype(dtype)


def _replaced(w_OI: np.ndarray, begin: int, change: Change, out_dtype: np.dtype) -> np.ndarray:
    """Return a block from row `begin` on. As in PEFT, round values to the tensor's dtype and add a bias in float32."""
    out_OI, end = cast(w_OI, out_dtype), begin + len(w_OI)
    if change.value is not None:
        values_KI = change.value.reshape(len(change.value), -1)
        if change.rows is None:
            out_OI = values_KI[begin:end].astype(out_dtype)
        else:
            out_OI = out_OI.copy()
            for row, value_I in zip(change.rows, values_KI, strict=True):
                if begin <= row < end:
                    out_OI[row - begin] = value_I.astype(out_dtype)
    if change.added is not None:
        added_O1 = change.added[begin:end, None].astype(np.float32) * np.float32(change.scale)
        start_O1 = out_OI if change.value is not None else w_OI
        out_OI = (start_O1.astype(np.float32) + added_O1).astype(out_dtype)
    return out_OI


def _check_finite(info: TensorInfo, before: np.ndarray, after: np.ndarray, out_tag: str) -> None:
    if not np.isfinite(after).all() and np.isfinite(before).all():
        raise ExportError(
            f'{info.name}: finite {info.dtype} values become infinite as {out_tag}; export with dtype="bfloat16" or '
            '"float32"'
        )


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's contents only, following links; the kernel copies, or shares blocks if the filesystem can."""
    with source.open("rb") as reader, target.open("wb") as writer:
        remaining = os.fstat(reader.fileno()).st_size
        try:
            while remaining:
                copied = os.copy_file_range(reader.fileno(), writer.fileno(), min(remaining, _COPY_BYTES))
                if not copied:
                    break
                remaining -= copied
        except (OSError, AttributeError):
            pass
        if remaining:  # another filesystem, or no such call
            reader.seek(0)
            writer.seek(0)
            shutil.copyfileobj(reader, writer, 1 << 22)


def _with_dtype(config: dict, dtype: str, top: bool) -> dict:
    """Return config.json with its dtype fields (`torch_dtype` before transformers 5) set, in nested configs too."""
    changed = {k: _with_dtype(v, dtype, False) if isinstance(v, dict) else v for k, v in config.items()}
    for key in ("dtype", "torch_dtype"):
        if isinstance(changed.get(key), str):
            changed[key] = dtype
    if top and "torch_dtype" not in changed:
        changed["dtype"] = dtype
    return changed


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
