"""README's table of families, from the rows of the parity suite. `make families` writes it."""

from pathlib import Path

from tiny import SIZES, TARGETS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- families: written by tests/helpers/readme_families.py -->\n", "<!-- end of families -->\n"
# Sizes that every family has, and what they cost.
_PLAIN = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}


def table() -> str:
    lines = ['| `model_type` | `"all-linear"` adapts | tested with |', "|---|---|---|"]
    for family in sorted(SIZES):
        fields = ", ".join(f"`{name}`" for name in sorted(SIZES[family].keys() - _PLAIN))
        targets = ", ".join(TARGETS[family])
        lines.append(f"| `{family}` | {targets} | {fields} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
