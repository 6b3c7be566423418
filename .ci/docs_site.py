"""A mkdocs hook: the pages beside docs/ (README, tables of benchmarks, clusters, examples) are part of the site."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
BESIDE = (*PAGES, "cluster/**/*", "examples/*", "benchmarks/results/*.md")
_LINK = re.compile(r"(\]\()([^)#:\s]+)")


def on_files(files: Files, config) -> Files:
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Pages of docs/ stand at the site's root: `../README.md` there, and `docs/data.md` elsewhere, lose a step."""
    beside = (ROOT / page.file.src_uri).is_file()
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match) -> str:
        start = folder if beside else posixpath.join("docs", folder)
        target = posixpath.normpath(posixpath.join(start, match.group(2)))
        if match.group(2).endswith("/"):
            target = posixpath.join(target, "README.md")
        return match.group(1) + posixpath.relpath(target.removeprefix("docs/"), folder or ".")

    return _LINK.sub(moved, markdown)
