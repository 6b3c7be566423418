"""Copy the files that an export contains besides its weights, and note those that it leaves out.

A file of the base is copied if it is data. The tokenizer's files are those that the model was trained with, if they are
known. Code is never copied: a configuration that names code is written without it, or is refused.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kithara_ray.errors import CheckpointError, UnsupportedError
from kithara_ray.hf.checkpoint import CONFIG, INDEX, BaseCheckpoint, read_json
from kithara_ray.hf.exports.reference import is_hub, split_reference
from kithara_ray.hf.fetch import names_at
from kithara_ray.hf.merging.merge import copy_file, write_json
from kithara_ray.hf.model_files import (
    TOKENIZER_CONFIG,
    is_carried,
    is_refused,
    is_tokenizer_file,
    is_vocabulary,
    matches,
    names_in,
    read_tokenizer,
    same_vocabulary,
)

log = logging.getLogger(__name__)

AUTO_MAP = "auto_map"
_OF_REPOSITORIES = (".gitattributes", ".gitignore")
# Files that every export writes itself.
_WRITTEN_ANEW = ("README.md", "run.json", "export_report.json")


def carry(
    base: BaseCheckpoint, directory: Path, base_name: str, tokenizer: Mapping[str, bytes] | None, with_model: bool
) -> list[str]:
    """Copy files into `directory`, which already holds config.json and weights; return notes.

    Args:
        base_name: the base's handle.
        tokenizer: the files of the tokenizer that the model was trained with, from `read_tokenizer`; None takes the
            base's.
        with_model: True if the export holds a whole model. An export of only an adapter gets the tokenizer, the
            processor and the licence; readers take all else from the base.
    """
    names, notes = names_in(base.directory), []
    tokenizer = dict(tokenizer or {})
    replaced = _replaced(base.directory, names, tokenizer)
    for name, data in tokenizer.items():
        _target(directory, name).write_bytes(data)
    for name in names:
        if is_carried(name, with_model) and name not in replaced and not (directory / name).exists():
            copy_file(base.directory / name, _target(directory, name))
    notes += _left_out(base, directory, base_name, replaced, with_model)
    gone = sorted(name for name in replaced if is_vocabulary(name) and name not in tokenizer)
    if gone:
        notes.append(f"the model was trained with another vocabulary: the base's {', '.join(gone)} were left out")
    for path in sorted(directory.glob("*.json")):
        notes += _without_code(path, base_name)
    return notes


def check_code(base: BaseCheckpoint, base_name: str) -> None:
    """Refuse a model whose config.json needs code that an export cannot name. Raises UnsupportedError."""
    files = _local_code(base.config)
    if files and not is_hub(base_name) and not _known(base.config.get("model_type")):
        raise UnsupportedError(
            f"{base.directory}: {CONFIG} needs code ({', '.join(files)}), which is not copied, and transformers has no "
            f"model_type {base.config.get('model_type')!r} of its own. Export the adapter alone, or give the base by "
            "its Hub name (hf://org/name), where loaders find the code"
        )


def _target(directory: Path, name: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _replaced(base: Path, names: list[str], tokenizer: Mapping[str, bytes]) -> set[str]:
    """Return the base's tokenizer files that the training's files replace."""
    if not tokenizer:
        return set()
    of_base = {name for name in names if is_tokenizer_file(name)}
    if same_vocabulary(tokenizer, read_tokenizer(str(base))):
        of_base = {name for name in of_base if not is_vocabulary(name)}
    return of_base


def _left_out(base: BaseCheckpoint, directory: Path, base_name: str, replaced: set[str], with_model: bool) -> list[str]:
    """Return notes that name every file of the base that the export lacks, or has with content of its own.

    A whole model's notes name those too that stayed on the Hub; an adapter's name those that were fetched.
    """
    names, notes = set(names_in(base.directory)), []
    broken = {path.relative_to(base.directory).as_posix() for path in _broken_links(base.directory)}
    url = base.source or (base_name if is_hub(base_name) and "snapshots" in base.directory.parts else None)
    if url is not None and with_model:
        try:
            names |= set(names_at(url))
        except CheckpointError as error:
            notes.append(f"the base's files that were not fetched could not be listed ({error})")
    own = [name for name in _WRITTEN_ANEW if name in names]
    written = {file.name for file in base.files} | {CONFIG, INDEX, *own}
    gone = sorted(
        name
        for name in (names | broken) - written - replaced - set(_OF_REPOSITORIES)
        if not (directory / name).exists() and not name.startswith((".git/", ".cache/"))
    )
    if gone:
        kinds = {name: "broken link" if name in broken else _kind(name) for name in gone}
        shown = [f"{name} ({kind})" if kind else name for name, kind in kinds.items()]
        where = "left out of the base's files" if with_model else "readers of the adapter take from its base"
        notes.append(f"{where}: {', '.join(shown)}")
    if own:
        notes.append(f"not the base's own, but of this export: {', '.join(own)}")
    return notes


def _broken_links(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_symlink() and not path.exists()]


def _kind(name: str) -> str:
    if name.endswith(".py"):
        return "code"
    if is_refused(name) or matches(name, ("*.safetensors",)):
        return "weights in another format"
    return ""


# --- code ------------------------------------------------------------------------------------------------------------


def _local_code(value: Mapping[str, Any]) -> list[str]:
    """Return the local modules that a configuration's auto_map names; `org/name--module.Class` is on the Hub."""
    references = _references(value.get(AUTO_MAP))
    modules = {reference.rpartition(".")[0] for reference in references if "--" not in reference}
    return sorted(f"{module.replace('.', '/')}.py" for module in modules if module)


def _references(auto_map: Any) -> list[str]:
    if isinstance(auto_map, Mapping):
        return [reference for value in auto_map.values() for reference in _references(value)]
    if isinstance(auto_map, (list, tuple)):
        return [reference for value in auto_map for reference in _references(value)]
    return [auto_map] if isinstance(auto_map, str) else []


def _known(model_type: str | None) -> bool:
    """True if transformers has this architecture itself."""
    from transformers import CONFIG_MAPPING  # takes seconds

    return model_type in CONFIG_MAPPING


def _without_code(path: Path, base_name: str) -> list[str]:
    """Remove a JSON file's references to missing code, or point them to the Hub; return notes."""
    if b'"auto_map"' not in path.read_bytes():
        return []
    value = read_json(path)
    files = _local_code(value)
    if not files:
        return []
    code = ", ".join(files)
    loads = {
        CONFIG: lambda: _known(value.get("model_type")),
        TOKENIZER_CONFIG: lambda: (path.parent / "tokenizer.json").exists(),
    }.get(path.name, lambda: True)()
    if not loads and is_hub(base_name):
        repository = split_reference(base_name)[0]
        write_json(path, value | {AUTO_MAP: _on_hub(value[AUTO_MAP], repository)})
        return [f"{path.name}: auto_map names the code of {repository} on the Hub ({code}), which was not copied"]
    own = _own_architecture(value) if path.name == CONFIG else {}
    value.pop(AUTO_MAP)
    write_json(path, value | own)
    note = f"{path.name}: auto_map was left out with its code ({code}); loaders take the class of transformers"
    return [note if loads else f"{path.name}: auto_map was left out with its code ({code}); nothing may load it now"]


def _own_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `architectures` with transformers' own class if it names a class of the code; else {}."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as OWN

    own = OWN.get(config.get("model_type"))
    if own is None or config.get("architectures") in (None, [own]):
        return {}
    from_code = {reference.rpartition(".")[2] for reference in _references(config.get(AUTO_MAP))}
    named = config["architectures"]
    return {"architectures": [own]} if set(named) & from_code else {}


def _on_hub(auto_map: Any, repository: str) -> Any:
    if isinstance(auto_map, Mapping):
        return {name: _on_hub(value, repository) for name, value in auto_map.items()}
    if isinstance(auto_map, (list, tuple)):
        return [_on_hub(value, repository) for value in auto_map]
    return auto_map if not isinstance(auto_map, str) or "--" in auto_map else f"{repository}--{auto_map}"
