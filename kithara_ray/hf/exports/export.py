"""Export a trained adapter in one of three layouts: by itself, next to its base, or merged into it.

An export is written to a staging directory, read back and proved there, and described in export_report.json. Only then
is it published. A failed proof raises ExportError and publishes nothing.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from kithara_ray import __version__ as VERSION
from kithara_ray.errors import ConfigError, ExportError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.card import Card, licence_of
from kithara_ray.hf.exports.carried import carry, check_code
from kithara_ray.hf.exports.notes import adapter_notes, max_lora_rank, serving_notes, tower_notes, unserved_ends
from kithara_ray.hf.exports.options import ExportOptions, check_experts
from kithara_ray.hf.exports.part import Part, Written, parts_of, remove_leftovers
from kithara_ray.hf.exports.proof import prove_adapter, prove_checkpoint
from kithara_ray.hf.exports.reference import shown_name, split_reference
from kithara_ray.hf.exports.run_record import published, without_paths
from kithara_ray.hf.fetch import fetch, tokenizer_at
from kithara_ray.hf.identity import identity_of
from kithara_ray.hf.merging.merge import CAST_TAGS, check_dtype, check_mergeable, refuse_quantized, write_json
from kithara_ray.hf.merging.merge import write_config as write_base_config
from kithara_ray.hf.merging.per_expert import per_expert
from kithara_ray.hf.publish import publish
from kithara_ray.hf.resizing.saved import saved_tables
from kithara_ray.hf.resizing.tables import described, resized
from kithara_ray.hf.safetensors_file import NUMPY_DTYPES
from kithara_ray.hf.tower import wrapper_of
from kithara_ray.storage import urls
from kithara_ray.storage.scratch import scratch

log = logging.getLogger(__name__)

REPORT = "export_report.json"
CARD = "README.md"
RUN = "run.json"
ADAPTER_DIRECTORY = (
    "adapter"  # separate from config.json: transformers redirects from_pretrained if one directory has both
)


class Layout(StrEnum):
    """ADAPTER: a PEFT directory. SEPARATE: the base with the adapter in adapter/. MERGED: one model."""

    ADAPTER = "adapter"
    SEPARATE = "separate"
    MERGED = "merged"


def export(base: BaseCheckpoint, adapter: Adapter, destination: str, layout: Layout, **options: Any) -> str:
    """Call `export_with_report` with these `ExportOptions`, and return the destination."""
    export_with_report(base, adapter, destination, layout, ExportOptions(**options))
    return str(destination)


def export_with_report(
    base: BaseCheckpoint,
    adapter: Adapter,
    destination: str,
    layout: Layout | str,
    options: ExportOptions,
) -> dict[str, Any]:
    """Write `layout` at `destination` (a directory or fsspec URL, absent or empty); return export_report.json.

    Raises DestinationError, AdapterError, UnsupportedError, ConfigError, ExportError; nothing is published then.
    """
    started_s = time.perf_counter()
    layout, destination, tag = _layout(layout), str(destination), check_dtype(options.dtype)
    check_experts(options.experts, layout is not Layout.MERGED)
    adapter = adapter.named_for(base).fitted(base)
    base = _with_rows(base, adapter, layout)
    adapter.validate(base)
    if layout is Layout.MERGED:
        check_mergeable(base, adapter, options.dtype)
    elif layout is Layout.SEPARATE and tag:
        refuse_quantized(base)
    if options.prove is not None and (layout is not Layout.MERGED or urls.is_url(destination)):
        raise ConfigError("export(prove=...) is for a merged model in a local directory; leave it out")
    if layout is not Layout.ADAPTER:
        check_code(base, options.base_name)
    settings = Settings(layout, options, options.files_of(base))
    with publish.staged(destination, _plan(base, adapter, settings), options.resume) as stage:
        report, files = _write(base, adapter, stage, settings)
        if options.prove is not None:
            report["checks"].append(options.prove(stage.directory))
        add_files(base, stage, report, adapter, destination, options)
        describe(stage, report, files, started_s)
    log.info("exported layout=%s destination=%s seconds=%.1f", layout, destination, report["seconds"])
    return report


def _with_rows(base: BaseCheckpoint, adapter: Adapter, layout: Layout) -> BaseCheckpoint:
    """Return the base with rows for added tokens, if the adapter has any; a layout with the base needs its bytes."""
    if layout is Layout.ADAPTER:
        return described(base, adapter.config)
    if base.source is not None and adapter.config.is_resized:
        base = BaseCheckpoint.open(fetch(base.source))
    return resized(base, adapter.config)


def _layout(layout: Layout | str) -> Layout:
    try:
        return Layout(layout)
    except ValueError:
        raise ConfigError(f"layout must be one of {', '.join(Layout)}, got {layout!r}") from None


@dataclass(frozen=True)
class Settings:
    """The arguments of an export that decide the written content, and the function that writes it.

    files: the result of `part.files_of`.
    tags: a safetensors tag per tensor, instead of `options.dtype`, if values have other dtypes than the base's.
    config.json and the index are then those of `like`.
    """

    layout: str
    options: ExportOptions
    files: dict[str, str]
    tags: Mapping[str, str] | None = None
    like: BaseCheckpoint | None = None


def _plan(base: BaseCheckpoint, adapter: Adapter, settings: Settings) -> str:
    """Digest everything that decides the weight files' bytes except the base's own bytes, which parts compare."""
    config, options = repr(adapter.config), settings.options
    what = [VERSION, settings.layout, options.dtype, settings.files, config, base.source, options.check_finite]
    what.append(options.experts)
    what.append(base.directory.name if base.source else str(base.directory))  # a cache's name identifies the version
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for name in sorted(adapter.tensors):
        digest.update(name.encode() + np.ascontiguousarray(adapter.tensors[name]).view(np.uint8).tobytes())
    return digest.hexdigest()


def _write(
    base: BaseCheckpoint, adapter: Adapter, stage: publish.Stage, settings: Settings
) -> tuple[dict[str, Any], dict[str, dict]]:
    """Fill and prove the stage; return the report without its file list, and the weight files' digests."""
    layout, dtype, base_name = settings.layout, settings.options.dtype, settings.options.base_name
    checks, counts, written = [], {}, []
    if layout is not Layout.ADAPTER:
        merged = adapter if layout is Layout.MERGED else None
        written = write_weights(base, merged, stage, settings)
        counts = {key: sum(file.counts[key] for file in written) for key in written[0].counts}
        checks.append("checkpoint reopened; untouched tensors equal the base's bit by bit")
        if merged:
            formula = "magnitude * (W + scale * B @ A) / its norm" if adapter.config.use_dora else "W + scale * B @ A"
            checks.append(f"sampled rows of every merged tensor equal {formula} in float64 up to rounding")
        if settings.options.check_finite:
            checks.append("every written weight is finite")
    if layout is not Layout.MERGED:
        target = stage.directory / ADAPTER_DIRECTORY if layout is Layout.SEPARATE else stage.directory
        final = per_expert(adapter, base) if settings.options.experts else adapter
        final = final.cast(NUMPY_DTYPES[CAST_TAGS[dtype]]) if check_dtype(dtype) else final
        name, revision = split_reference(base_name)[0], identity_of(base, base_name).revision
        tables = saved_tables(final.config, base)
        final.write(target, name, revision, _fingerprint(base, written), tables)
        prove_adapter(target, final, tables)
        checks.append("adapter reopened; tensors equal those given bit by bit, scales equal")
        adapter = final
    notes = adapter_notes(adapter, counts) + (serving_notes(base, adapter) if layout is not Layout.MERGED else [])
    notes += tower_notes(base, dtype) if layout is not Layout.ADAPTER else []
    report = {
        "layout": str(layout),
        "dtype": dtype,
        "base": {
            "name": shown_name(base_name),
            "fingerprint": _fingerprint(base, written),
            "tensors": len(base.tensors),
        },
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


def write_weights(
    base: BaseCheckpoint, merged: Adapter | None, stage: publish.Stage, settings: Settings
) -> list[Written]:
    """Write the weight files with `write`, then config.json and the index; prove them as one checkpoint."""
    dtype, files = settings.options.dtype, settings.files
    like = settings.like or base
    parts = parts_of(base, merged, stage.target, settings.tags or dtype, files, settings.options.check_finite)
    stage.expect([part.name for part in parts])
    written = _taken_up(stage, parts)
    for file in settings.options.write([part for part in parts if part.name not in written]):
        stage.add(file.name, file.record())
        written[file.name] = file
    if written.keys() != {part.name for part in parts}:
        raise ExportError(f"{len(written)} of {len(parts)} weight files were written; start the export again")
    remove_leftovers(stage.directory)
    configs = write_base_config(like, stage.directory, dtype, files)
    with contextlib.ExitStack() as stack:
        directory = stage.directory
        if stage.is_remote:
            directory = stack.enter_context(scratch())
            stage.read_headers(directory)
            for path in configs:
                shutil.copyfile(path, directory / path.name)
        prove_checkpoint(directory, like, check_dtype(dtype), files)
    return [written[part.name] for part in parts]


def _taken_up(stage: publish.Stage, parts: list[Part]) -> dict[str, Written]:
    """Check again and return the weight files that an earlier run left.

    They are checked against the base if it is at hand, and byte by byte if they are local.
    """
    taken, kept = {}, stage.kept()
    for part in parts:
        if part.name not in kept:
            continue
        written = Written.of(part.name, kept[part.name])
        same_base = part.base.source or part.base.digests() == written.digests
        if same_base and (stage.is_remote or digest(stage.directory / part.name) == written.file):
            taken[part.name] = written
        else:
            stage.drop(part.name)
    if taken:
        log.info("resumed: files=%d of %d", len(taken), len(parts))
    return taken


def _fingerprint(base: BaseCheckpoint, written: list[Written]) -> str | None:
    """Return the base's fingerprint; None if nothing read its weights, as for only an adapter of a remote base."""
    if written:
        return base.fingerprint_of({name: digest for file in written for name, digest in file.digests.items()})
    known = base.original or base
    return None if known.source else known.fingerprint()


def add_files(
    base: BaseCheckpoint,
    stage: publish.Stage,
    report: dict[str, Any],
    adapter: Adapter | None,
    destination: str,
    options: ExportOptions,
) -> None:
    """Add everything besides weights and config.json: copied files, run.json and the card. Notes go into the report."""
    base_name, run, tokenizer = options.base_name, options.run, options.tokenizer
    directory, with_model = stage.directory, report["layout"] != Layout.ADAPTER
    files, notes = tokenizer_at(tokenizer) if tokenizer else {}, []
    if tokenizer and not files:
        notes.append(f"{without_paths(tokenizer)}: the training's tokenizer is gone; the export has the base's")
    notes += carry(base, directory, base_name, files, with_model)
    told, stops = unserved_ends(base, directory, files, with_model)
    report["tokenizer"] = "of the training" if files else "of the base"
    report["notes"] += [*notes, *told]
    for note in report["notes"]:
        log.warning("%s", note)
    if run:
        write_json(directory / RUN, published(run))
    licence, multimodal = licence_of(base.directory), wrapper_of(base.config) is not None
    card = Card(base_name, destination, directory, report, adapter, run, licence, stops, multimodal)
    (directory / CARD).write_text(card.text(), encoding="utf-8")


def describe(stage: publish.Stage, report: dict[str, Any], files: Mapping[str, dict], started_s: float) -> None:
    """Write the last file of a stage: the report, with the list of all files added.

    files: the weight files' digests. started_s: the start, from `time.perf_counter`.
    """
    report["files"] = dict(sorted((dict(files) | _other_files(stage.directory, files)).items()))
    report["seconds"] = round(time.perf_counter() - started_s, 3)
    write_json(stage.directory / REPORT, report)


def _other_files(directory: Path, known: Iterable[str]) -> dict[str, dict]:
    """Return size and SHA-256 of the files in a stage's directory that are not known yet."""
    names = (p.relative_to(directory).as_posix() for p in sorted(directory.rglob("*")) if p.is_file())
    return {name: digest(directory / name) for name in names if name != publish.MARKER and name not in known}


def digest(path: Path) -> dict[str, object]:
    """Return size and SHA-256 of a file, as a report names them."""
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
