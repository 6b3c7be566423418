"""Run `kithara-ray models`: the families, or for each given model whether it is accepted, as a table or JSON."""

import dataclasses
import json
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from kithara_ray.hf.tower import WRAPPERS
from kithara_ray.model.families import FAMILIES
from kithara_ray.model.families.admission import Admission
from kithara_ray.redact import redact


def families_json() -> str:
    return json.dumps([{"model_type": name, "class": made or None} for name, made in _classes().items()], indent=1)


def families_table() -> Table:
    classes = _classes()
    table = Table("model_type", "computed by", title=f"{len(classes)} families", highlight=False)
    for name, made in classes.items():
        table.add_row(name, made or "the general decoder block")
    return table


def _classes() -> dict[str, str]:
    """Map each `model_type` to KerasHub's class, which for a multimodal model is its text model's."""
    texts = {name: name for name in FAMILIES} | {name: wrapper.text for name, wrapper in WRAPPERS.items()}
    return {name: FAMILIES[texts[name]].causal_lm for name in sorted(texts)}


def as_json(found: Sequence[Admission]) -> str:
    order = ("handle", "model_type", "accepted", "reason", "parameters")
    rows = [dataclasses.asdict(each) | {"accepted": each.accepted} for each in found]
    return redact(json.dumps([{name: row[name] for name in order} for row in rows], indent=1))


def as_table(found: Sequence[Admission]) -> Table:
    accepted = sum(each.accepted for each in found)
    table = Table("handle", "model_type", "parameters", "", "reason", highlight=False)
    table.title = f"{accepted} of {len(found)} accepted"
    for each in found:
        count = "" if each.parameters is None else short_count(each.parameters)
        verdict = "[green]accepted[/]" if each.accepted else "[bold red]refused[/]"
        reason = escape(redact(each.reason or ""))
        table.add_row(escape(redact(each.handle)), escape(each.model_type or ""), count, verdict, reason)
    return table


def short_count(parameters: int) -> str:
    """Write a number of parameters as 135M or 8.0B."""
    return f"{parameters / 1e9:.1f}B" if parameters >= 999.5e6 else f"{parameters / 1e6:.0f}M"
