"""The three layouts in which a trained adapter leaves: alone, beside its base, merged into it.

Everything is written to a staging directory, read back and proved there, described in export_report.json, and only
then published. A failed proof raises ExportError and publishes nothing.
"""

import fnmatch
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path

from kithara_ray.errors import ConfigError, ExportError
from kithara_ray.hf import publish, storage
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.card import max_lora_rank, model_card, serving_notes, split_reference
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.merge import CAST_TAGS, check_dtype, check_mergeable, copy_file, refuse_quantized, write_json
from kithara_ray.hf.merge import write_config as write_base_config
from kithara_ray.hf.part import Part, Written, digest, parts_of, write_part, write_serially
from kithara_ray.hf.proof import prove_adapter, prove_checkpoint
from kithara_ray.hf.safetensors_file import NUMPY_DTYPES

__all__ = ["Layout", "Part", "Written", "export", "write_part", "write_serially"]

log = logging.getLogger(__name__)

REPORT = "export_report.json"
CARD = "README.md"
RUN = "run.json"
ADAPTER_DIRECTORY = (
    "adapter"  # apart from config.json: transformers redirects from_pretrained where both stand together
)
TOKENIZER_FILES = (
    ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")
    + ("*.model", "chat_template*")
)  # fmt: skip
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
MODEL_EXTRAS = ("generation_config.json",)


class Layout(StrEnum):
    """ADAPTER: a PEFT directory. SEPARATE: the base with the adapter in adapter/. MERGED: one model."""

    ADAPTER = "adapter"
    SEPARATE = "separate"
    MERGED = "merged"


def export(
    base: BaseCheckpoint,
    adapter: Adapter,
    destination: str,
    layout: Layout,
    *,
    dtype: str = "auto",
    base_name: str,
    run: Mapping[str, object] | None = None,
    write: Callable[[list[Part]], Iterable[Written]] = write_serially,
) -> str:
    """Write `layout` at `destination` (a directory or fsspec URL that is absent or empty); returns the destination.

    base_name: what adapter_config.json names as its base, a hub name, a path, or an hf:// handle with a revision.
    dtype: "auto" keeps every dtype. "float32", "bfloat16" and "float16" apply to all floating tensors that are
    written: the adapter's in ADAPTER, base and adapter in SEPARATE, the merged weights in MERGED (factors stay exact).
    run: what is known of the training; written as run.json. write: what runs the parts, one per weight file.
    Raises DestinationError, AdapterError, UnsupportedError, ConfigError, ExportError; nothing is published then.
    """
    started_s = time.perf_counter()
    layout, destination, tag = _layout(layout), str(destination), check_dtype(dtype)
    adapter.validate(base)
    if layout is Layout.MERGED:
        check_mergeable(base, adapter)
    elif layout is Layout.SEPARATE and tag:
        refuse_quantized(base)
    with publish.staged(destination) as stage:
        report, files = _write(base, adapter, stage, layout, dtype, base_name, write)
        if run:
            write_json(stage.directory / RUN, dict(run))
        (stage.directory / CARD).write_text(model_card(base_name, adapter, report), encoding="utf-8")
        files |= {name: digest(stage.directory / name) for name in _files(stage.directory) if name not in files}
        report["files"] = dict(sorted(files.items()))
        report["seconds"] = round(time.perf_counter() - started_s, 3)
        write_json(stage.directory / REPORT, report)
    log.info("exported layout=%s destination=%s seconds=%.1f", layout, destination, report["seconds"])
    return destination


def _layout(layout: Layout | str) -> Layout:
    try:
        return Layout(layout)
    except ValueError:
        raise ConfigError(f"layout must be one of {', '.join(Layout)}, got {layout!r}") from None


def _write(
    base: BaseCheckpoint,
    adapter: Adapter,
    stage: publish.Stage,
    layout: Layout,
    dtype: str,
    base_name: str,
    write: Callable[[list[Part]], Iterable[Written]],
) -> tuple[dict[str, object], dict[str, dict]]:
    """Fill and prove the stage; returns the report without its file list, and the weight files' digests."""
    checks, counts, written = [], {}, []
    if layout is not Layout.ADAPTER:
        merged = adapter if layout is Layout.MERGED else None
        written = _write_base(base, merged, stage, dtype, write)
        counts = {key: sum(file.counts[key] for file in written) for key in written[0].counts}
        checks.append("checkpoint reopened; untouched tensors equal the base's bit by bit")
        if merged:
            formula = "magnitude * (W + scale * B @ A) / its norm" if adapter.config.use_dora else "W + scale * B @ A"
            checks.append(f"sampled rows of every merged tensor equal {formula} in float64 up to rounding")
    if layout is not Layout.MERGED:
        target = stage.directory / ADAPTER_DIRECTORY if layout is Layout.SEPARATE else stage.directory
        final = adapter.cast(NUMPY_DTYPES[CAST_TAGS[dtype]]) if check_dtype(dtype) else adapter
        final.write(target, *split_reference(base_name))
        prove_adapter(target, final)
        checks.append("adapter reopened; tensors equal those given bit by bit, scales equal")
    carried = TOKENIZER_FILES + LICENCE_FILES + (MODEL_EXTRAS if layout is not Layout.ADAPTER else ())
    _carry_over(base, stage.directory, carried)
    notes = _notes(adapter, counts) + (serving_notes(base, adapter) if layout is not Layout.MERGED else [])
    for note in notes:
        log.warning("%s", note)
    report = {
        "layout": str(layout),
        "dtype": dtype,
        "base": {"name": base_name, "fingerprint": _fingerprint(base, written), "tensors": len(base.tensors)},
        "adapter": {
            "modules": len(adapter.modules),
            "parameters": adapter.parameters,
            "r": adapter.config.r,
            "lora_alpha": adapter.config.alpha,
            "all_zero": adapter.is_zero,
            "vllm_max_lora_rank": max_lora_rank(adapter),
        },
        "tensors": counts,
        "checks": checks,
        "notes": notes,
    }
    return report, {file.name: file.file for file in written}


def _write_base(
    base: BaseCheckpoint,
    merged: Adapter | None,
    stage: publish.Stage,
    dtype: str,
    write: Callable[[list[Part]], Iterable[Written]],
) -> list[Written]:
    """The weight files, by `write`, then config.json and the index; proven as one checkpoint."""
    if stage.is_remote:
        stage.placed += [file.name for file in base.files]
    written = list(write(parts_of(base, merged, stage.target, dtype)))
    if sorted(file.name for file in written) != sorted(file.name for file in base.files):
        raise ExportError(f"{len(written)} of {len(base.files)} weight files were written; start the export again")
    configs = write_base_config(base, stage.directory, dtype)
    if not stage.is_remote:
        prove_checkpoint(stage.directory, base, check_dtype(dtype))
        return written
    with tempfile.TemporaryDirectory(prefix="kithara_ray_proof_") as scratch:
        stage.headers_of_placed(Path(scratch))
        for path in configs:
            shutil.copyfile(path, Path(scratch, path.name))
        prove_checkpoint(Path(scratch), base, check_dtype(dtype))
    return written


def _fingerprint(base: BaseCheckpoint, written: list[Written]) -> str | None:
    """Of the base; None when nothing read its weights: an adapter alone, of a base that stays on an object store."""
    if written:
        return base.fingerprint_of({name: digest for file in written for name, digest in file.digests.items()})
    return None if base.source else base.fingerprint()


def _notes(adapter: Adapter, counts: dict[str, int]) -> list[str]:
    if adapter.is_zero:
        return ["every lora_B is zero: the adapter is untrained and the model computes what the base computes"]
    unchanged = counts.get("merged", 0) - counts.get("merged_and_changed", 0)
    if unchanged:
        return [f"{unchanged} of {counts['merged']} merged tensors equal the base: their delta is zero or rounds away"]
    return []


def _carry_over(base: BaseCheckpoint, directory: Path, patterns: tuple[str, ...]) -> None:
    """Copy the base's files that match; never what the export wrote, never code or pickles."""
    for path in sorted(base.directory.iterdir()):
        wanted = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
        refused = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in storage.REFUSED_FILES)
        if wanted and not refused and path.is_file() and not (directory / path.name).exists():
            copy_file(path, directory / path.name)


def _files(directory: Path) -> Iterator[str]:
    return (p.relative_to(directory).as_posix() for p in sorted(directory.rglob("*")) if p.is_file())
