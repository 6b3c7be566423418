"""An export's record of its training: the published run.json, and the facts that the model card shows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Entries of run.json about the host and its storage; only the run's own file keeps them.
_OF_THE_HOST = frozenset(
    {"run_config", "path", "storage_path", "error"}
    | {"tensorboard_dir", "profiler", "checkpointer", "checkpoint_dir", "output_dir", "export_dir"}
)
# The same at the top of run.json; deeper, a name such as "config" means something else, an optimizer's for one.
_OF_A_RECORD = frozenset({"platform", "environment", "config", "git"})
# A path at the start of a text, or after a quote, a space or a bracket.
_LOCAL_PATH = re.compile(r"""(?:(?<=^)|(?<=[\s'"(\[=,]))(?:file://)?(?:~|\.{1,2})?(?:/[^\s'",)\]/]+)+/?""")


def published(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return run.json for readers elsewhere: without facts of the host, with local paths cut to their last part."""
    return _without(run, _OF_THE_HOST | _OF_A_RECORD)


def _without(entries: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {key: _published(value) for key, value in entries.items() if key not in names}


def _published(value: Any) -> Any:
    if isinstance(value, Mapping):
        is_record = "manifest_version" in value
        return published(value) if is_record else _without(value, _OF_THE_HOST)
    if isinstance(value, (list, tuple)):
        return [_published(inner) for inner in value]
    return without_paths(value) if isinstance(value, str) else value


def without_paths(text: str) -> str:
    """Cut the local paths in a text to their last part."""
    if "{%" in text or "{{" in text:  # a chat template
        return text
    return _LOCAL_PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)


@dataclass(frozen=True)
class Facts:
    """Rows of the card's tables, name -> text. `datasets` holds names on the Hub."""

    data: dict[str, str] = field(default_factory=dict)
    training: dict[str, str] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()


def facts_of(run: Mapping[str, Any] | None) -> Facts:
    """Return the facts about a run that matter to the model's users; unknown facts are left out."""
    if not run:
        return Facts()
    run = {**_mapping(run.get("training")), **{key: value for key, value in run.items() if key != "training"}}
    settings, result = _mapping(run.get("settings")), _mapping(run.get("result"))
    loader = _mapping(settings.get("train_dataloader"))
    sources = _sources(_mapping(loader.get("dataset")))
    return Facts(
        data=_data(run, loader, sources),
        training=_training(run, settings, loader),
        results=_results(run, result),
        datasets=tuple(dict.fromkeys(name for source in sources if (name := _hub_dataset(source)))),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _sources(dataset: Mapping[str, Any]) -> list[str]:
    """List files and data sets by name; rows that a script held in memory have none."""
    parts = dataset.get("datasets")
    if isinstance(parts, list):
        return [source for part in parts for source in _sources(_mapping(part))]
    found = dataset.get("source")
    named = found if isinstance(found, list) else [found]
    return [text for text in named if isinstance(text, str) and ("." in text or "/" in text)]


def _hub_dataset(source: str) -> str | None:
    match = re.match(r"hf://datasets/([^/@]+/[^/@]+)", source)
    return match[1] if match else None


def _data(run: Mapping[str, Any], loader: Mapping[str, Any], sources: list[str]) -> dict[str, str]:
    counts = _mapping(_mapping(run.get("data")).get("train"))
    dataset = _mapping(loader.get("dataset"))
    rows, tokens, trained = (counts.get(name) for name in ("rows", "tokens", "trained_tokens"))
    told = {}
    if sources:
        names = list(dict.fromkeys(_hub_dataset(source) or without_paths(source) for source in sources))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        told["Source"] = ", ".join(f"`{name}`" for name in names[:3]) + more
    if isinstance(rows, int):
        told["Rows"] = f"{rows:,}"
    if isinstance(tokens, int):
        share = f", of which {trained:,} are trained on" if isinstance(trained, int) else ""
        told["Tokens"] = f"{tokens:,}{share}"
    if isinstance(dataset.get("max_seq_len"), int):
        packed = ", rows packed" if loader.get("packing") else ""
        told["Sequence length"] = f"up to {dataset['max_seq_len']:,} tokens{packed}"
    return told


def _training(run: Mapping[str, Any], settings: Mapping[str, Any], loader: Mapping[str, Any]) -> dict[str, str]:
    told, last = {}, _mapping(run.get("last_step"))
    if isinstance(run.get("adapters"), list):
        told["Adapters"] = ", ".join(f"`{without_paths(str(adapter))}`" for adapter in run["adapters"])
    step = last.get("step", run.get("step"))
    if isinstance(step, int):
        epochs = f" ({last['epoch']:.3g} epochs)" if isinstance(last.get("epoch"), (int, float)) else ""
        told["Steps"] = f"{step:,}{epochs}"
    mesh, rows = _mapping(run.get("mesh")), run.get("rows_per_device_and_step")
    if isinstance(rows, int) and isinstance(mesh.get("devices"), int):
        told["Batch"] = f"{rows * mesh['devices']} rows a step"
    optimizer, values = run.get("optimizer"), _mapping(run.get("optimizer_settings"))
    if isinstance(optimizer, str):
        shown = [f"{name.replace('_', ' ')} {values[name]:g}" for name in _SHOWN if _is_number(values.get(name))]
        told["Optimizer"] = ", ".join([optimizer, *shown])
    precision = run.get("precision") or _mapping(settings.get("model")).get("precision")
    if isinstance(precision, str):
        told["Precision"] = f"`{precision}`"
    seed = run.get("seed", _mapping(run.get("seeds")).get("factors"))
    if isinstance(seed, int):
        told["Seed"] = str(seed)
    return told


_SHOWN = ("learning_rate", "weight_decay")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _results(run: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    values: dict[str, Any] = {}
    for found in (run.get("metrics"), result.get("metrics"), run.get("last_step"), run.get("evaluation")):
        values |= _mapping(found)
    names = {"loss": "Training loss, last step", "eval_loss": "Evaluation loss", "eval_perplexity": "Perplexity"}
    return {title: f"{values[name]:.4g}" for name, title in names.items() if _is_number(values.get(name))}
