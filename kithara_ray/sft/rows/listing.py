"""Find the files of a source: a file, directory, pattern or list of these, of one split and one subset.

Splits are found in this order:

    state.json, dataset_dict.json   files that `datasets` writes beside a saved dataset
    README.md                       `configs` in its header, as the Hub reads it
    names                           `train-00000-of-00002.parquet`, or `train`, `dev`, `test`, ... as a word in the name
                                    of the file or of a directory below the source

Files of several splits are never read together, because training would then use held-out rows.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec
import yaml

from kithara_ray.errors import DataError
from kithara_ray.sft.rows.reading import reading
from kithara_ray.sft.rows.split_slices import RowSlice, parsed

KNOWN = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt")
PACKED = (".gz", ".bz2", ".xz", ".zst")
# Files that describe the rows, or a model beside them.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _KEYWORDS.items() for word in words}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Choice:
    """The part of a source to read; None if there is only one.

    split: the split's name, or a slice of it: "train[:10%]".
    """

    split: str | None = None
    subset: str | None = None

    @property
    def name(self) -> str | None:
        """The split's name alone."""
        return parsed(self.split)[0]

    @property
    def rows(self) -> RowSlice | None:
        """The slice of the split's rows; None takes all."""
        return parsed(self.split)[1]


class File(NamedTuple):
    """A file of a source.

    columns: the columns that a saved dataset shows; None shows all.
    """

    url: str
    size: int
    columns: tuple[str, ...] | None = None


def files_of(source: Any, choice: Choice = Choice()) -> list[File]:
    """Return every file, in the order of the names.

    Raises:
        DataError: there is no such file, split or subset, or there are several and none is chosen.
    """
    found = []
    for path in source if isinstance(source, (list, tuple)) else [source]:
        url = str(path)
        with reading(url, "cannot be opened"):
            fs, root = fsspec.core.url_to_fs(url)
            names = _names(fs, root, url, choice)
            columns = _shown(fs, names) if names and fs.isdir(root.rstrip("/") or root) else None
            full = [fs.unstrip_protocol(name) if "://" in url else name for name in names]
            infos = [File(one, fs.size(name), columns) for one, name in zip(full, names, strict=True)]
        if not infos:
            raise DataError(f"{url}: holds no file of a known extension; known are {', '.join(KNOWN)}")
        found += infos
    return found


def suffix_of(name: str) -> str:
    """The extension of a file's format, without that of its compression."""
    suffixes = PurePosixPath(name).suffixes
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def kind_of(url: str) -> str:
    """The format of a file, one of KNOWN. Raises DataError."""
    if (suffix := suffix_of(url)) not in KNOWN:
        raise DataError(f"{url}: unknown extension {suffix!r}; known are {', '.join(KNOWN)}")
    return suffix


def _names(fs: Any, root: str, url: str, choice: Choice) -> list[str]:
    root = root.rstrip("/") or root
    if "*" in root:
        fixed = root[: root.index("*")].rpartition("/")[0]
        found = sorted(name for name in fs.glob(root) if suffix_of(name) in KNOWN)
        return _by_name(found, fixed, url, choice)
    if fs.isdir(root):
        return _of_directory(fs, root, url, choice)
    if not suffix_of(root) and not fs.exists(root):
        raise FileNotFoundError(root)
    kind_of(url)
    if choice.subset is not None:
        raise DataError(f"{url}: is a single file and has no subset {choice.subset!r}; leave subset= out")
    return _by_name([root], root.rpartition("/")[0], url, choice)


def _of_directory(fs: Any, root: str, url: str, choice: Choice) -> list[str]:
    if fs.isfile(f"{root}/dataset_dict.json"):
        splits = _read(fs, f"{root}/dataset_dict.json")["splits"]
        _no_subset(url, choice)
        return _of_saved(fs, f"{root}/{chosen(splits, choice.name, url)}")
    if fs.isfile(f"{root}/state.json") and fs.isfile(f"{root}/dataset_info.json"):
        _no_subset(url, choice)
        if choice.name is not None:
            chosen([_read(fs, f"{root}/state.json").get("_split") or "train"], choice.name, url)
        return _of_saved(fs, root)
    found = sorted(name for name in fs.find(root) if _is_rows(name, root))
    configs = _configs(fs, root)
    if configs:
        return _of_config(fs, root, url, choice, configs)
    if choice.subset is not None:
        subsets = sorted({_below(name, root).split("/")[0] for name in found if "/" in _below(name, root)})
        root = f"{root}/{chosen(subsets, choice.subset, url, 'subset')}"
        found = [name for name in found if name.startswith(f"{root}/")]
    return _by_name(found, root, url, choice)


def _is_rows(name: str, root: str) -> bool:
    below = PurePosixPath(_below(name, root))
    return (
        suffix_of(name) in KNOWN and below.name not in _ABOUT and not any(p.startswith((".", "_")) for p in below.parts)
    )


def _below(name: str, root: str) -> str:
    return name.removeprefix(root).lstrip("/")


def _no_subset(url: str, choice: Choice) -> None:
    if choice.subset is not None:
        raise DataError(f"{url}: was written by save_to_disk and has no subset {choice.subset!r}; leave subset= out")


def _of_saved(fs: Any, root: str) -> list[str]:
    """The files of a dataset that save_to_disk wrote: only those that its state names, and no caches."""
    return [f"{root}/{entry['filename']}" for entry in _read(fs, f"{root}/state.json")["_data_files"]]


def _shown(fs: Any, names: list[str]) -> tuple[str, ...] | None:
    """The columns that a saved dataset's format keeps; None for all, and for other files."""
    state = f"{names[0].rpartition('/')[0]}/state.json"
    if suffix_of(names[0]) != ".arrow" or not fs.isfile(state):
        return None
    kept = _read(fs, state)
    columns = kept.get("_format_columns")
    return None if columns is None or kept.get("_output_all_columns") else tuple(columns)


def _read(fs: Any, name: str) -> Any:
    return json.loads(fs.cat_file(name))


# --- splits ----------------------------------------------------------------------------------------------------------


def chosen(names: Any, name: str | None, where: str, what: str = "split") -> str:
    """Return the requested name, or the only one. Raises DataError, which lists them."""
    names = [str(each) for each in names]
    if name is None and len(names) == 1:
        return names[0]
    listed = ", ".join(map(repr, names)) or "none"
    if name is None and not names:
        raise DataError(f"{where}: has no {what}")
    if name is None:
        example = "train" if "train" in names else names[0]
        raise DataError(f"{where}: has several {what}s, {listed}; choose one: {what}={example!r}")
    wanted = _SPLIT_OF_WORD.get(name, name) if what == "split" and name not in names else name
    if wanted not in names:
        several = "; for several, make a dataset of each and `mix` them" if what == "split" and "+" in name else ""
        raise DataError(f"{where}: has no {what} {name!r}; there are {listed}{several}")
    return wanted


def split_of(below: str) -> str | None:
    """The split that a file's name indicates, or else a directory's name; None for no split."""
    *directories, name = PurePosixPath(below).parts
    stem = name.split(".")[0] if "-of-" not in name else name
    if shard := _SHARD.match(stem):
        return _SPLIT_OF_WORD.get(shard[1], shard[1])
    for part in (name.removesuffix("".join(PurePosixPath(name).suffixes[-2:])), *reversed(directories)):
        words = {_SPLIT_OF_WORD[word] for word in re.split(r"[-._ 0-9]+", part.lower()) if word in _SPLIT_OF_WORD}
        if words:
            return "+".join(sorted(words))
    return None


def _by_name(names: list[str], root: str, url: str, choice: Choice) -> list[str]:
    splits = {name: split_of(_below(name, root)) for name in names}
    found = [split for split in dict.fromkeys(splits.values()) if split is not None]
    if choice.name is not None:
        wanted = chosen(found, choice.name, url)
        return [name for name in names if splits[name] == wanted]
    unnamed = [name for name in names if splits[name] is None]
    if found and unnamed and len(names) > 1:
        raise DataError(
            f"{url}: has files of {', '.join(map(repr, found))}, and files of no split, such as {unnamed[0]}; choose a "
            f"split: split={found[0]!r}, or give the files themselves"
        )
    if len(found) > 1:
        chosen(found, None, url)
    return names


# --- the Hub's header ------------------------------------------------------------------------------------------------


def _configs(fs: Any, root: str) -> list[Mapping[str, Any]]:
    """The subsets that README.md describes by `data_files`; none without such a header."""
    if not fs.isfile(f"{root}/README.md"):
        return []
    text = fs.cat_file(f"{root}/README.md").decode(errors="replace")
    header = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        configs = (yaml.safe_load(header[1]) or {}).get("configs") if header else None
    except (yaml.YAMLError, AttributeError):
        configs = None
    configs = configs if isinstance(configs, list) else []
    return [config for config in configs if isinstance(config, Mapping) and "data_files" in config]


def _of_config(fs: Any, root: str, url: str, choice: Choice, configs: list[Mapping[str, Any]]) -> list[str]:
    subsets = {str(config.get("config_name", "default")): config for config in configs}
    subset = choice.subset
    if subset is None and len(subsets) > 1:
        subset = next((name for name, config in subsets.items() if config.get("default")), None)
        subset = subset or ("default" if "default" in subsets else None)
    config = subsets[chosen(subsets, subset, url, "subset")]
    within = "/".join(filter(None, [root, str(config.get("data_dir") or "").strip("/")]))
    files = _patterns(config["data_files"])
    split = chosen(files, choice.name, url)
    names = [
        name
        for pattern in files[split]
        for name in sorted(fs.glob(f"{within}/{pattern}") if "*" in pattern else [f"{within}/{pattern}"])
    ]
    return [name for name in dict.fromkeys(names) if suffix_of(name) in KNOWN]


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Split -> patterns, from any of the forms that a header allows."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    if isinstance(data_files, Mapping):
        return {str(split): [path] if isinstance(path, str) else list(path) for split, path in data_files.items()}
    found: dict[str, list[str]] = {}
    for entry in data_files:
        split, path = (entry.get("split", "train"), entry["path"]) if isinstance(entry, Mapping) else ("train", entry)
        found.setdefault(str(split), []).extend([path] if isinstance(path, str) else path)
    return found
