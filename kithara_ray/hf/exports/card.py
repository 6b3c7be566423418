"""What an export says to people: its README.md (a Hugging Face model card), and notes for who will serve it."""

import json
from collections.abc import Mapping

from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint

VLLM_RANKS = (8, 16, 32, 64, 128, 256)  # what vLLM takes as --max-lora-rank

_LOAD = {
    "adapter": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("DIRECTORY")""",
    "separate": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("DIRECTORY")
model = PeftModel.from_pretrained(base, "DIRECTORY/adapter")""",
    "merged": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")""",
}
_SERVE = {
    "adapter": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules mine=DIRECTORY",
    "separate": "vllm serve DIRECTORY --enable-lora --max-lora-rank {rank} --lora-modules mine=DIRECTORY/adapter",
    "merged": "vllm serve DIRECTORY",
}
_WHAT = {
    "adapter": "A LoRA adapter of",
    "separate": "A copy of the base, with a LoRA adapter of it in `adapter/`:",
    "merged": "A model with a LoRA adapter merged into its weights:",
}


_TRAINED = "A model whose weights were all trained, from"


def split_reference(base_name: str) -> tuple[str, str | None]:
    """(name, revision) of `hf://org/name@revision`; any other handle is its own name."""
    if not base_name.startswith("hf://"):
        return base_name, None
    name, _, revision = base_name.removeprefix("hf://").partition("@")
    return name, revision or None


def max_lora_rank(adapter: Adapter) -> int | None:
    """The smallest --max-lora-rank of vLLM that this adapter fits; None when there is none."""
    rank = max(adapter.config.rank_of(module) for module in adapter.modules)
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def serving_notes(base: BaseCheckpoint, adapter: Adapter) -> list[str]:
    """What a server that applies the adapter (vLLM) would get wrong or refuse; a merged model has no such limits."""
    notes, config = [], adapter.config
    if max_lora_rank(adapter) is None:
        notes.append(f"vLLM serves adapters of rank {VLLM_RANKS[-1]} at most; serve the merged layout")
    if config.use_dora:
        notes.append("vLLM does not serve DoRA adapters; serve the merged layout")
    if config.has_beside or config.lora_bias:
        notes.append("vLLM applies no biases, trained tokens or saved modules of an adapter; serve the merged layout")
    scales = {config.scale_of(module) for module in adapter.modules}
    if len(scales) > 1:
        notes.append(
            "modules have different scales (rank_pattern, alpha_pattern), and vLLM reads one r and one lora_alpha: "
            "it would compute something else; serve the merged layout"
        )
    elif {config.rank_of(module) for module in adapter.modules} != {config.r}:
        notes.append("vLLM scales by r of adapter_config.json, which no rank_pattern changes; serve the merged layout")
    known = {module.rpartition(".")[2] for module in adapter.modules}
    for leaf in sorted(known & {"embed_tokens", "lm_head"}):
        notes.append(f"{leaf} is a target: vLLM does not apply adapters to embeddings; serve the merged layout")
    return notes


def stop_notes(base: BaseCheckpoint) -> list[str]:
    """Whether a server stops where the tokenizer's end of sequence stands: answers are trained to end there."""
    try:
        config = json.loads((base.directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        added = json.loads((base.directory / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        end = config["eos_token"]
        text = end["content"] if isinstance(end, dict) else end
        number = next(token["id"] for token in added if token["content"] == text)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return []  # no tokenizer of this kind beside the base: nothing to compare
    generation = base.directory / "generation_config.json"
    stops: set[int] = set()
    for settings in (base.config, json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}):
        found = settings.get("eos_token_id")
        stops |= set(found) if isinstance(found, list) else {found}
    if number in stops:
        return []
    return [
        f"the tokenizer ends sequences with {text!r} ({number}), which is no eos_token_id of the base's config.json or "
        f"generation_config.json ({sorted(stop for stop in stops if stop is not None)}): give it as a stop token"
    ]


def model_card(base_name: str, adapter: Adapter, report: dict, run: Mapping[str, object] | None = None) -> str:
    """README.md of an export from its report, and from what is known of the training."""
    layout, config = report["layout"], adapter.config
    name, revision = split_reference(base_name)
    is_hub = base_name.startswith("hf://")
    rank = max_lora_rank(adapter) or "-"
    library = "peft" if layout == "adapter" else "transformers"
    front = ["---", *([f"base_model: {name}"] if is_hub else []), f"library_name: {library}"]
    front += ["pipeline_tag: text-generation", "tags:", "- lora", "- kithara-ray", "---"]
    settings = {
        "base": f"`{name}`" + (f" at revision `{revision}`" if revision else ""),
        "fingerprint of the base": f"`{report['base']['fingerprint']}`" if report["base"]["fingerprint"] else None,
        "target modules": f"all that match `{config.target_modules}`"
        if isinstance(config.target_modules, str)
        else ", ".join(f"`{target}`" for target in config.target_modules),
        "rank": str(config.r) + (f", and {config.rank_pattern}" if config.rank_pattern else ""),
        "alpha": f"{config.alpha:g}" + (f", and {config.alpha_pattern}" if config.alpha_pattern else ""),
        "scale": "alpha / sqrt(rank)" if config.use_rslora else "alpha / rank",
        "magnitudes": "trained apart (DoRA)" if config.use_dora else None,
        "trained beside the factors": ", ".join(f"`{name}`" for name in _beside(adapter)) or None,
        "adapted modules, parameters": f"{len(adapter.modules)}, {adapter.parameters:,}",
        "dtype": "as in the base" if report["dtype"] == "auto" else report["dtype"],
        "tensors": ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in report["tensors"].items()) or None,
    }
    lines = [*front, "", f"# {name.rstrip('/').rpartition('/')[2]}, fine-tuned", "", f"{_WHAT[layout]} `{name}`.", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in settings.items() if value), ""]
    if run:
        lines += ["## Training", "", "| | |", "|---|---|"]
        lines += [f"| {key.replace('_', ' ')} | {_shown(value)} |" for key, value in run.items()] + [""]
    lines += ["## Load", "", "```python", _LOAD[layout], "```", "", "```sh"]
    lines += [_SERVE[layout].format(base=name, rank=rank), "```", "", "## Checked before it was published", ""]
    lines += [f"- {check}" for check in report["checks"]]
    if report["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in report["notes"])]
    lines += ["", "`export_report.json` has the same for machines, with the SHA-256 of every file.", ""]
    return "\n".join(lines)


def _beside(adapter: Adapter) -> list[str]:
    """What it trains besides, in words of its config."""
    config = adapter.config
    named = {"bias": config.bias, "lora_bias": config.lora_bias, "modules_to_save": list(config.modules_to_save)}
    named["trainable_token_indices"] = {name: list(rows) for name, rows in config.trainable_token_indices.items()}
    return [f"{name}={value}" for name, value in named.items() if value and value != "none"]


def _shown(value: object) -> str:
    """A cell of a table."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def trained_card(base_name: str, report: dict) -> str:
    """README.md of a model whose weights were all trained, from its export's report."""
    name, revision = split_reference(base_name)
    front = ["---", *([f"base_model: {name}"] if base_name.startswith("hf://") else []), "library_name: transformers"]
    front += ["pipeline_tag: text-generation", "tags:", "- kithara-ray", "---"]
    lines = [*front, "", f"# {name.rstrip('/').rpartition('/')[2]}, trained", "", f"{_TRAINED} `{name}`"]
    lines[-1] += f" at revision `{revision}`." if revision else "."
    dtype = "as in the base" if report["dtype"] == "auto" else report["dtype"]
    lines += ["", f"{report['tensors']['trained']} tensors, dtype {dtype}.", "", "## Load", "", "```python"]
    lines += [_LOAD["merged"], "```", "", "```sh", _SERVE["merged"], "```", ""]
    lines += ["## Checked before it was published", "", *(f"- {check}" for check in report["checks"]), ""]
    lines += ["`export_report.json` has the same for machines, with the SHA-256 of every file.", ""]
    return "\n".join(lines)


def summary(destination: str, report: dict) -> str:
    """An export_report.json in a few lines, for whoever started the export."""
    weights = {name: entry for name, entry in report["files"].items() if name.endswith(".safetensors")}
    size_gb = sum(entry["bytes"] for entry in weights.values()) / 1e9
    lines = [f"exported {report['layout']} to {destination}: {len(weights)} weight files, {size_gb:.3g} GB"]
    if counts := report["tensors"]:
        merged = f"{counts['merged']} merged ({counts['merged_and_changed']} changed)"
        lines.append(f"  tensors: {merged}, {counts['untouched']} as in the base")
    lines += [f"  proven: {check}" for check in report["checks"]]
    lines += [f"  note: {note}" for note in report["notes"]]
    return "\n".join([*lines, f"  {report['seconds']:.1f} s; every file's SHA-256 is in export_report.json"])
