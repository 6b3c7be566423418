"""What the pages of docs/ say to type."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Its fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page: Path) -> list[str]:
    """Its lines that begin with kithara-ray, in shell blocks and indented ones, without comments."""
    indented = re.findall(r"^    (kithara-ray .*)$", page.read_text(), re.M)
    typed = [line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("kithara-ray ")]
    return [re.split(r"  +| #|;", line)[0] for line in indented + typed]


def with_sections(text: str, block: str) -> str:
    """A configuration with the sections of a YAML block in the place of its own."""
    for name, content in re.findall(r"^(\w+):\n((?:[ ].*\n)+)", block.replace("\n\n", "\n"), re.M):
        section = re.compile(rf"^#?{name}:.*\n(?:[ ].*\n)+", re.M)
        assert len(section.findall(text)) == 1, name
        start, end = section.search(text).span()
        text = f"{text[:start]}{name}:\n{content}{text[end:]}"
    return text
