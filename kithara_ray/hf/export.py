"""The three layouts in which a trained adapter leaves: alone, beside its base, merged into it.

Everything is written to a staging directory, read back and proved there, described in export_report.json, and only
then published. A failed proof raises ExportError and publishes nothing.
"""

import fnmatch
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from kithara_ray.errors import ConfigError
from kithara_ray.hf import storage
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.merge import CAST_TAGS, check_dtype, check_mergeable, copy_file, merge_file, refuse_quantized
from kithara_ray.hf.merge import write_config as write_base_config
from kithara_ray.hf.proof import prove_adapter, prove_base
from kithara_ray.hf.safetensors_file import NUMPY_DTYPES

log = logging.getLogger(__name__)

REPORT = "export_report.json"
ADAPTER_DIRECTORY = (
    "adapter"  # apart from config.json: transformers redirects from_pretrained where both stand together
)
TOKENIZER_FILES = (
    ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")
    + ("*.model", "chat_template*")
)  # fmt: skip
MODEL_EXTRAS = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


class Layout(StrEnum):
    """ADAPTER: a PEFT directory. SEPARATE: the base with the adapter in adapter/. MERGED: one model."""

    ADAPTER = "adapter"
    SEPARATE = "separate"
    MERGED = "merged"


def export(
    base: BaseCheckpoint, adapter: Adapter, destination: str, layout: Layout, *, dtype: str = "auto", base_name: str
) -> str:
    """Write `layout` at `destination` (a directory or fsspec URL that is absent or empty); returns the destination.

    base_name: what adapter_config.json names as its base, a hub name, a path, or an hf:// handle with a revision.
    dtype: "auto" keeps every dtype. "float32", "bfloat16" and "float16" apply to all floating tensors that are
    written: the adapter's in ADAPTER, base and adapter in SEPARATE, the merged weights in MERGED (factors stay exact).
    Raises DestinationError, AdapterError, UnsupportedError, ConfigError, ExportError; nothing is published then.
    """
    started_s = time.perf_counter()
    layout, destination, tag = _layout(layout), str(destination), check_dtype(dtype)
    adapter.validate(base)
    if layout is Layout.MERGED:
        check_mergeable(base, adapter)
    elif layout is Layout.SEPARATE and tag:
        refuse_quantized(base)
    with storage.staged(destination) as directory:
        report = _write(base, adapter, directory, layout, dtype, base_name)
        report["files"] = {name: _digest(directory / name) for name in _files(directory)}
        report["seconds"] = round(time.perf_counter() - started_s, 3)
        (directory / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    log.info("exported layout=%s destination=%s seconds=%.1f", layout, destination, report["seconds"])
    return destination


def _layout(layout: Layout | str) -> Layout:
    try:
        return Layout(layout)
    except ValueError:
        raise ConfigError(f"layout must be one of {', '.join(Layout)}, got {layout!r}") from None


def _write(
    base: BaseCheckpoint, adapter: Adapter, directory: Path, layout: Layout, dtype: str, base_name: str
) -> dict[str, object]:
    """Fill and prove the staging directory; returns the report without its file list."""
    tag, checks, counts = check_dtype(dtype), [], {}
    if layout is not Layout.ADAPTER:
        merged = adapter if layout is Layout.MERGED else None
        for file in base.files:
            merge_file(base, merged, file, directory, dtype)
        write_base_config(base, directory, dtype)
        counts = prove_base(directory, base, merged, tag)
        checks.append("checkpoint reopened; untouched tensors equal the base's bit by bit")
        if merged:
            checks.append("sampled rows of every merged tensor equal W + scale * B @ A in float64 up to rounding")
    if layout is not Layout.MERGED:
        target = directory / ADAPTER_DIRECTORY if layout is Layout.SEPARATE else directory
        written = adapter.cast(NUMPY_DTYPES[CAST_TAGS[dtype]]) if tag else adapter
        name, _, revision = (
            base_name.removeprefix("hf://").partition("@") if _is_hub(base_name) else (base_name, "", "")
        )
        written.write(target, name, revision or None)
        prove_adapter(target, written)
        checks.append("adapter reopened; tensors equal those given bit by bit, scales equal")
    _carry_over(base, directory, TOKENIZER_FILES if layout is Layout.ADAPTER else TOKENIZER_FILES + MODEL_EXTRAS)
    notes = _notes(adapter, counts)
    for note in notes:
        log.warning("%s", note)
    return {
        "layout": str(layout),
        "dtype": dtype,
        "base": {"name": base_name, "fingerprint": base.fingerprint(), "tensors": len(base.tensors)},
        "adapter": {
            "modules": len(adapter.modules),
            "parameters": adapter.parameters,
            "r": adapter.config.r,
            "lora_alpha": adapter.config.alpha,
            "all_zero": adapter.is_zero,
        },
        "tensors": counts,
        "checks": checks,
        "notes": notes,
    }


def _is_hub(base_name: str) -> bool:
    return base_name.startswith("hf://")


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


def _digest(path: Path) -> dict[str, object]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
