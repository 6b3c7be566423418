"""The model card of an export, README.md, for readers who find the model on the Hub; and a summary for a terminal."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.exports.notes import max_lora_rank
from kithara_ray.hf.exports.reference import is_hub, is_repository, shown_name, split_reference
from kithara_ray.hf.exports.run_record import facts_of
from kithara_ray.hf.model_files import LICENCE_FILES, matches, names_in

__all__ = ["Card", "licence_of", "summary"]

_LOADING = {
    "adapter": """import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{here}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{here}")""",
    "adapter over its base": """import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto", device_map="auto")
{resize}model = PeftModel.from_pretrained(base, "{here}")
tokenizer = AutoTokenizer.from_pretrained("{here}")""",
    "separate": """import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{here}", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, {adapter})
tokenizer = AutoTokenizer.from_pretrained("{here}")""",
    "merged": """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{here}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{here}")""",
}
_CHAT = """messages = [{{"role": "user", "content": "What is your name?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
_TEXT = """inputs = tokenizer("What is your name?", return_tensors="pt")"""
_ANSWER = """inputs = inputs.to(model.device)
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=100{stop})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_SERVING = {
    "adapter": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules mine={here}",
    "separate": "vllm serve {here} --enable-lora --max-lora-rank {rank} --lora-modules mine={here}/adapter",
    "merged": "vllm serve {here}",
}
_KIND = {
    "adapter": "A LoRA adapter for {base}, trained with kithara_ray.",
    "separate": "A copy of {base} and, in `adapter/`, a LoRA adapter for it, trained with kithara_ray.",
    "merged": "{base}, fine-tuned by LoRA with kithara_ray. The adapter is merged into the weights.",
    "trained": "{base}, all of its weights fine-tuned with kithara_ray.",
}
_RELATION = {"adapter": "adapter"}  # the Hub's `base_model_relation`; "finetune" otherwise

_NOTE_CHARACTERS = 600


@dataclass(frozen=True)
class Card:
    """A model card and the facts that it is built from.

    Attributes:
        base_name: the base's handle.
        destination: the export's; a card on the Hub loads the model from there.
        directory: the exported files, except the card.
        report: export_report.json, as far as it is complete.
        adapter: None if all weights were trained.
        run: the known facts about the training.
        licence: fields of the base's own card, from `licence_of`.
        stops: stop ids that a user must give when decoding; None if the files contain them.
        multimodal: True if the base is a multimodal model, of which the text model was trained.
    """

    base_name: str
    destination: str
    directory: Path
    report: Mapping[str, Any]
    adapter: Adapter | None = None
    run: Mapping[str, Any] | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    stops: Sequence[int] | None = None
    multimodal: bool = False

    def text(self) -> str:
        facts = facts_of(self.run)
        parts = [self._front(facts.datasets), f"# {self._title}", self._kind, *self._use()]
        training = {**self._method(), **facts.training}
        for title, rows in (("Training data", facts.data), ("Training", training), ("Results", facts.results)):
            if rows:
                parts += [f"## {title}", _table(rows)]
        if self.report["notes"]:
            parts += ["## Limitations", "\n".join(f"- {_shortened(note)}" for note in self.report["notes"])]
        parts += ["## License", self._licence()]
        more = " `run.json` has the settings and versions of the training." if self.run else ""
        checks = "\n".join(f"- {check}" for check in self.report["checks"])
        parts += ["## Verification", f"The export was read back and checked before it was published:\n\n{checks}"]
        parts += [f"`export_report.json` lists every file with its SHA-256.{more}"]
        return "\n\n".join(parts) + "\n"

    # --- what stands where -------------------------------------------------------------------------------------------

    @property
    def _layout(self) -> str:
        return self.report["layout"]

    @property
    def _repository(self) -> str | None:
        """The base's name on the Hub."""
        name = split_reference(self.base_name)[0]
        return name if is_hub(self.base_name) or (is_repository(name) and not Path(name).exists()) else None

    @property
    def _here(self) -> str:
        """Return the name that a reader gives to load the export."""
        return self.destination.removeprefix("hf://") if is_hub(self.destination) else "path/to/this/directory"

    @property
    def _title(self) -> str:
        if is_hub(self.destination):
            return self._here.rpartition("/")[2]
        how = "fine-tuned" if self._layout == "trained" else "LoRA adapter" if self._layout == "adapter" else "LoRA"
        return f"{shown_name(self.base_name).rpartition('/')[2]}, {how}"

    @property
    def _base(self) -> str:
        name, revision = split_reference(self.base_name)
        if self._repository is None:
            return f"`{shown_name(self.base_name)}`"
        link = f"[{name}](https://huggingface.co/{name})"
        return f"{link} (revision `{revision}`)" if revision else link

    @property
    def _kind(self) -> str:
        return _KIND[self._layout].format(base=self._base)

    def _front(self, datasets: tuple[str, ...]) -> str:
        """Return the metadata that the Hub reads."""
        lines = []
        if self._repository:
            lines += [f"base_model: {self._repository}"]
            lines += [f"base_model_relation: {_RELATION.get(self._layout, 'finetune')}"]
        lines += [f"library_name: {'peft' if self._layout == 'adapter' else 'transformers'}"]
        lines += ["pipeline_tag: text-generation"]
        lines += [f"{name}: {value}" for name, value in self.licence.items()]
        if datasets:
            lines += ["datasets:", *(f"- {name}" for name in datasets)]
        tags = [*(["lora"] if self.adapter is not None else []), "kithara-ray"]
        return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])

    def _use(self) -> list[str]:
        """Return the sections on loading and serving."""
        names = names_in(self.directory)
        chats = any(name.startswith(("chat_template", "additional_chat_templates/")) for name in names)
        config = self.directory / "tokenizer_config.json"
        chats = chats or (config.is_file() and b'"chat_template"' in config.read_bytes())
        layout = "merged" if self._layout == "trained" else self._layout
        adapter = f'"{self._here}", subfolder="adapter"' if is_hub(self.destination) else f'"{self._here}/adapter"'
        base, code = self._repository or "path/to/the/base", _LOADING[layout]
        rows = self.adapter.config.resize_token_embeddings if self.adapter is not None else None
        if layout == "adapter" and (self.multimodal or rows is not None):
            code = _LOADING["adapter over its base"]
        if self.multimodal:
            # The names of adapter and weights are those of the whole model. For some families, AutoModelForCausalLM
            # builds only the text model, or nothing.
            code = code.replace("ForCausalLM", "ForImageTextToText")
        resize = "" if rows is None else f"base.resize_token_embeddings({rows})\n"
        loading = code.format(here=self._here, adapter=adapter, base=base, resize=resize)
        answer = _ANSWER.format(stop=f", eos_token_id={list(self.stops)}" if self.stops else "")
        code = "\n\n".join([loading, (_CHAT if chats else _TEXT).format(), answer])
        parts = ["## Use", f"```python\n{code}\n```"]
        rank = max_lora_rank(self.adapter) if self.adapter is not None else None
        if layout == "merged" or rank is not None:
            command = _SERVING[layout].format(base=base, rank=rank, here=self._here)
            parts += ["With vLLM:", f"```sh\n{command}\n```"]
        return parts

    def _method(self) -> dict[str, str]:
        """Return the rows on how the weights were trained."""
        if self.adapter is None:
            told = {"Method": f"all weights trained ({self.report['tensors']['trained']:,} tensors)"}
        else:
            config = self.adapter.config
            kind = "DoRA" if config.use_dora else "rank-stabilised LoRA" if config.use_rslora else "LoRA"
            told = {"Method": f"{kind}, rank {config.r}, alpha {config.alpha:g}"}
            if config.rank_pattern or config.alpha_pattern:
                told["Method"] += ", with exceptions (`adapter_config.json`)" * (self._layout != "merged")
            if isinstance(config.target_modules, str):
                told["Target modules"] = f"names that match `{config.target_modules}`".replace("|", "\\|")
            else:
                modules = (module for module in self.adapter.modules if config.parameter_of(module) is None)
                leaves = {module.rpartition(".")[2] for module in modules}
                told["Target modules"] = ", ".join(f"`{leaf}`" for leaf in sorted(leaves)) or "none"
            if config.target_parameters:
                told["Target parameters"] = ", ".join(f"`{name}`" for name in sorted(config.target_parameters))
            told["Trained parameters"] = f"{self.adapter.parameters:,}"
            if beside := _beside(self.adapter):
                told["Trained besides"] = ", ".join(f"`{name}`" for name in beside)
        if self.report["dtype"] != "auto":
            told["Weights"] = f"`{self.report['dtype']}`"
        return told

    def _licence(self) -> str:
        named, files = self.licence.get("license"), [n for n in names_in(self.directory) if matches(n, LICENCE_FILES)]
        links = ", ".join(f"[{name}]({name})" for name in files)
        link = self.licence.get("license_link", "")
        if named and named != "other":
            text = f"The base is licensed as `{named}`; its terms apply to this model too."
        elif named:
            name = self.licence.get("license_name", "see there")
            text = f"The base has a licence of its own, {name}; it applies to this model too."
        else:
            text = f"The licence of {self._base} applies to this model too."
        if link.startswith("https://"):
            text += f" Text: {link}."
        return f"{text} Included: {links}." if links else text


def _beside(adapter: Adapter) -> list[str]:
    """Return the adapter_config.json entries for weights that are trained besides the factors."""
    config = adapter.config
    named: dict[str, object]
    named = {"bias": config.bias, "lora_bias": config.lora_bias, "modules_to_save": list(config.modules_to_save)}
    named["trainable_token_indices"] = {name: list(rows) for name, rows in config.trainable_token_indices.items()}
    named["resize_token_embeddings"] = config.resize_token_embeddings
    return [f"{name}={value}" for name, value in named.items() if value and value != "none"]


def _table(rows: Mapping[str, str]) -> str:
    cells = ((key, " ".join(value.split())) for key, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)])


_PLAIN = re.compile(r"[\w .,:/+@()#?=&~%-]+")


def licence_of(directory: Path) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` of a base's own card, if it has one that names them."""
    path = directory / "README.md"
    if not path.is_file():
        return {}
    front = re.match(r"---\r?\n(.*?)\r?\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = {}
    for name in ("license", "license_name", "license_link"):
        line = re.search(rf"^{name}:[ \t]*(.+?)[ \t]*$", front[1], re.MULTILINE) if front else None
        value = line[1].strip("\"'") if line else ""
        if _PLAIN.fullmatch(value):
            found[name] = value
    return found


def summary(destination: str, report: dict) -> str:
    """Summarise an export_report.json in a few lines, for the user who started the export."""
    weights = {name: entry for name, entry in report["files"].items() if name.endswith(".safetensors")}
    size_gb = sum(entry["bytes"] for entry in weights.values()) / 1e9
    lines = [f"exported {report['layout']} to {destination}: {len(weights)} weight files, {size_gb:.3g} GB"]
    if counts := report["tensors"]:
        merged = f"{counts['merged']} merged ({counts['merged_and_changed']} changed)"
        lines.append(f"  tensors: {merged}, {counts['untouched']} as in the base")
    lines += [f"  proven: {check}" for check in report["checks"]]
    lines += [f"  note: {note}" for note in report["notes"]]
    return "\n".join([*lines, f"  {report['seconds']:.1f} s; every file's SHA-256 is in export_report.json"])


def _shortened(note: str) -> str:
    """Cut a long list of files after an entry; export_report.json has the whole note."""
    if len(note) <= _NOTE_CHARACTERS:
        return note
    return f"{note[:_NOTE_CHARACTERS].rpartition(', ')[0]}, ... (the whole list is in export_report.json)"
