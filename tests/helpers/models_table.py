"""The table of models in docs/models.md. `make models CONFIGS=DIRECTORY` writes it, from a directory of models.

Each model is a directory there; its config.json is enough.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from kithara_ray.cli.models import short_count
from kithara_ray.model.families.admission import Admission, admissions

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- models: written by tests/helpers/models_table.py -->\n", "<!-- end of models -->\n"


def table(found: Sequence[Admission]) -> str:
    """A row for each model, named by the last part of its handle."""
    accepted = sum(each.accepted for each in found)
    lines = [f"{accepted} of {len(found)} are accepted.", ""]
    lines += ["| model | `model_type` | parameters | accepted, or the reason |", "|---|---|---|---|"]
    for each in found:
        count = "" if each.parameters is None else short_count(each.parameters)
        reason = (each.reason or "accepted").removeprefix("config.json: ").replace("|", "\\|")
        lines.append(f"| {Path(each.handle).name} | `{each.model_type}` | {count} | {reason} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, found: Sequence[Admission]) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(found) + END + after


if __name__ == "__main__":
    models = sorted(str(path.parent) for path in Path(sys.argv[1]).glob("*/config.json"))
    if not models:
        sys.exit(f"{sys.argv[1]}: no directory there holds a config.json")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), admissions(models)), encoding="utf-8")
