"""How the library speaks: no docstring, page or message opens with a word that needs the sentence before it."""

import ast
import re
from collections.abc import Iterator

import pytest
from doc_pages import PAGES, ROOT

OPENS = re.compile(r"\s*(What|Of|Whether|Those|By)\b")
SOURCES = sorted((ROOT / "kithara_ray").rglob("*.py"))


def openings(source: str) -> Iterator[str]:
    """The first words of each docstring, and of each text that an exception is raised with."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                yield from _texts(argument)


def _texts(node: ast.expr) -> Iterator[str]:
    first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else node
    if isinstance(first, ast.Constant) and isinstance(first.value, str):
        yield first.value


def paragraphs(page: str) -> Iterator[str]:
    """The lines that begin a paragraph, a heading, a list's item or a table's row."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
    for block in re.split(r"\n\s*\n", text):
        for number, line in enumerate(block.splitlines()):
            if number == 0 or re.match(r"[-*|#]|\d+\.", line.strip()):
                yield re.sub(r"^[\s|#*>-]*(\d+\. )?", "", line)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_and_messages(path):
    assert not [text[:60] for text in openings(path.read_text()) if OPENS.match(text)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_pages(page):
    assert not [line[:60] for line in paragraphs(page.read_text()) if OPENS.match(line)]


def test_the_check_sees_them():
    source = '"""What a run is."""\n\n\ndef f(x):\n    """Whether."""\n    raise ValueError(f"Of {x} none")\n'
    assert [bool(OPENS.match(text)) for text in openings(source)] == [True, True, True]
    assert [line for line in paragraphs("## What it is\n\nOf rows.\nBy the way\n\n- Those\n") if OPENS.match(line)] == [
        "What it is",
        "Of rows.",
        "Those",
    ]
