"""Check that a job's copy of the working directory holds the files that its configuration reads."""

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.rows.files import as_sequence, is_local
from kithara_ray.sft.rows.listing import Choice, files_of

logger = logging.getLogger(__name__)

Keys = tuple[str | int, ...]

# Keys that name a Hugging Face directory, and the suffixes of the files that a run reads there.
_DIRECTORIES = {
    "preset_handle": (".json", ".safetensors", ".model", ".jinja", ".txt"),
    "adapter": (".json", ".safetensors"),
    "tokenizer_handle": (".json", ".model", ".jinja", ".txt"),
}
_INSTEAD = "give a URL such as gs://..., or an absolute path of the head node"


def check_packed(raw: Mapping[str, Any], directory: Path, packed: Collection[Path], left_out: str) -> None:
    """Check the relative paths in a configuration. The job looks for them in its copy of the directory.

    Args:
        raw: the configuration's content.
        directory: the directory to pack, absolute.
        packed: its files that are packed.
        left_out: the reason why a file is not packed, for messages.

    Raises:
        ConfigError: lists every file that the job would miss.
    """
    problems = []
    for keys, path, needed in _reads(raw, directory):
        try:
            missing = [file for file in needed() if file not in packed]
        except (DataError, ConfigError) as error:
            problems.append(f"{_dotted(keys)}: {error}")
            continue
        if missing:
            names = [str(file.relative_to(directory)) for file in missing]
            more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
            lacks = f"the job's copy of {directory} has no {names[0]}{more}: {left_out}"
            problems.append(f"{_dotted(keys)}: {path!r}: {lacks}; {_INSTEAD}")
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _reads(raw: Mapping[str, Any], directory: Path) -> Iterator[tuple[Keys, str, Any]]:
    """Yield (keys, path, function that lists its files) for each path that the job reads from the copy."""
    for keys, section in _sections(raw, ()):
        for name, suffixes in _DIRECTORIES.items():
            for path in _paths(section.get(name), (*keys, name), directory):
                yield (*keys, name), path, lambda path=path, suffixes=suffixes: _in_directory(directory, path, suffixes)
        template = section.get("chat_template")  # Jinja text, or the path of a file with it
        if isinstance(template, str) and _is_file(directory, template):
            yield (*keys, "chat_template"), template, lambda path=template: [_inside(directory, path)]
        if "source" in section and ("type" in section or "dataset" in keys):
            choice = Choice(section.get("split"), section.get("subset"))
            for path in _paths(section["source"], (*keys, "source"), directory):
                yield (*keys, "source"), path, lambda path=path, choice=choice: _of_source(directory, path, choice)
    for name, way in (_mapping(_mapping(raw.get("tune")).get("space"))).items():
        last = name.rpartition(".")[2]
        for value in next(iter(way.values()), ()) if isinstance(way, Mapping) else ():
            section = {last: value, "type": ""} if last in ("source", *_DIRECTORIES) else {}
            for keys, path, needed in _reads(section, directory):
                yield ("tune", "space", name, *keys[1:]), path, needed


def _sections(value: Any, keys: Keys) -> Iterator[tuple[Keys, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        yield keys, value
        for key, inner in value.items():
            if key != "tune":
                yield from _sections(inner, (*keys, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _sections(inner, (*keys, number))


def _is_file(directory: Path, value: Any) -> bool:
    return isinstance(value, str) and "\n" not in value and len(value) < 256 and (directory / value).is_file()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _paths(value: Any, keys: Keys, directory: Path) -> Iterator[str]:
    """Yield the relative paths in a value. Absolute ones are on the head node, and cannot be checked here."""
    for path in as_sequence(value) or ([value] if isinstance(value, str) else ()):
        local = path.removeprefix("file://").removeprefix("local://")
        if not is_local(path) or "${" in path:
            continue
        if not os.path.isabs(os.path.expanduser(local)):
            yield local
        elif Path(os.path.expanduser(local)).is_relative_to(directory):
            logger.warning(
                "%s: %s is a path of this machine; the job runs in a copy of %s, where %r finds it",
                *(_dotted(keys), local, directory, os.path.relpath(os.path.expanduser(local), directory)),
            )


def _inside(directory: Path, path: str) -> Path:
    found = Path(os.path.normpath(directory / path))
    if not found.is_relative_to(directory):
        raise ConfigError(f"{path!r} is outside of {directory}, of which the job gets a copy; {_INSTEAD}")
    return found


def _in_directory(directory: Path, path: str, suffixes: tuple[str, ...]) -> list[Path]:
    found = _inside(directory, path)
    if not found.is_dir():
        raise ConfigError(f"there is no directory {path!r} in {directory}; {_INSTEAD}, or hf://org/name")
    return sorted(file for file in found.iterdir() if file.suffix in suffixes and file.is_file())


def _of_source(directory: Path, path: str, choice: Choice) -> list[Path]:
    files = files_of(str(_inside(directory, path)), choice)
    return [Path(file.url.removeprefix("file://")) for file in files]


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))
