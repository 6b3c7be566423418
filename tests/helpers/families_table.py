"""The table of families in docs/features.md, from the rows of the parity suite. `make families` writes it."""

from pathlib import Path

from tiny import IN_ALL_LINEAR, SIZES, TARGETS, text_size

PAGE = Path(__file__).parents[2] / "docs" / "features.md"
BEGIN, END = "<!-- families: written by tests/helpers/families_table.py -->\n", "<!-- end of families -->\n"
# Sizes that every family has, and what they cost.
_PLAIN = {
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
}


def table() -> str:
    lines = ['| `model_type` | `"all-linear"` adapts | tested with |', "|---|---|---|"]
    for family in sorted(SIZES):
        fields = ", ".join(f"`{name}`" for name in sorted(text_size(family).keys() - _PLAIN))
        parameters = ("experts", "router") if family in IN_ALL_LINEAR else ()
        targets = ", ".join((*TARGETS[family], *parameters))
        kind, _, word = family.partition(" ")
        lines.append(f"| `{kind}`{word and f', {word}'} | {targets} | {fields} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
