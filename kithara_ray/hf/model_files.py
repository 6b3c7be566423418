"""The files of a model directory by kind, and the files that an export contains.

weights, configuration    written by the export
tokenizer                 the training's files, else the base's
other data                copied: processors, generation settings, quantisation settings, licences
code and pickles          never copied; the export's report names them
"""

import fnmatch
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from kithara_ray.storage.places import Place

TEMPLATES = "additional_chat_templates"  # transformers keeps all but the default template there
SUBDIRECTORIES = (TEMPLATES,)
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

# A tokenizer needs at least one of these files to load.
_TOKENIZERS = ("tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model", "tekken.json")
# Files that hold only a vocabulary, and nothing that training may change.
_VOCABULARIES = ("*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "vocab.bpe")
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", f"{TEMPLATES}/*.jinja"),
    *_VOCABULARIES,
)
_PROCESSOR_FILES = ("processor_config.json", "*preprocessor_config.json")
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# Other data files of a model.
_DATA_FILES = ("*.json", "*.jinja", "*.txt")
# Data that does not describe the export: files that it writes itself, other adapters and formats, traces of training.
_NOT_OF_A_MODEL = (
    *("config.json", "*.index.json", "params.json", "adapter_config.json", "run.json", "export_report.json"),
    *("trainer_state.json", "training_args*", "*_results.json", "optimizer*", "scheduler*", "requirements*.txt"),
)
# Never taken from anywhere: code, pickles and the formats of other loaders.
REFUSED_FILES = (
    "*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "consolidated*",
)  # fmt: skip


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if a file's path in a model directory matches one of `patterns`; `*` does not reach into a subdirectory."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_refused(name: str) -> bool:
    return matches(name.rpartition("/")[2], REFUSED_FILES)


def is_tokenizer_file(name: str) -> bool:
    return matches(name, _TOKENIZER_FILES) and not is_refused(name)


def is_vocabulary(name: str) -> bool:
    """True for a tokenizer's file that holds only a vocabulary."""
    return matches(name, _VOCABULARIES)


def is_carried(name: str, with_model: bool) -> bool:
    """True if an export copies this file of the base. The export holds a whole model, or only an adapter."""
    patterns = (*_TOKENIZER_FILES, *_PROCESSOR_FILES, *LICENCE_FILES)
    if with_model and not matches(name, _NOT_OF_A_MODEL):
        patterns = (*patterns, *_DATA_FILES)
    return matches(name, patterns) and not is_refused(name)


def names_in(directory: Path) -> list[str]:
    """List every file below a local directory, by its path in it."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def has_tokenizer(location: str) -> bool:
    """True if a tokenizer's files are in a directory or at a URL."""
    return bool(set(Place(str(location)).files("")) & set(_TOKENIZERS))


def read_tokenizer(location: str) -> dict[str, bytes]:
    """Read the tokenizer's files in a directory or at a URL, and the generation settings beside them; {} without any.

    They record the tokenizer that a model was trained with: in a run's `tokenizer/`, or beside a PEFT adapter.
    """
    place = Place(str(location))
    names = [*place.files(""), *(f"{TEMPLATES}/{name}" for name in place.files(TEMPLATES))]
    if not set(names) & set(_TOKENIZERS):
        return {}
    wanted = [name for name in sorted(names) if is_tokenizer_file(name) or name == GENERATION]
    return {name: place.read(*_parts(name)) for name in wanted}


def write_files(location: str, files: Mapping[str, bytes]) -> None:
    """Write files to a directory or URL, replacing everything there. Raises DestinationError."""
    place = Place(str(location))
    for directory in ("", *SUBDIRECTORIES):
        stale = [name for name in place.files(directory) if f"{directory}/{name}".lstrip("/") not in files]
        if stale:
            place.remove(directory, stale)
    for name, data in files.items():
        place.put_bytes(data, *_parts(name))


def _parts(name: str) -> tuple[str, str]:
    directory, _, leaf = name.rpartition("/")
    return directory, leaf


def same_vocabulary(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> bool:
    """True if two tokenizers' files give each token the same id, as far as this module can read both formats."""
    if "tokenizer.json" in one and "tokenizer.json" in other:
        try:
            return _vocabulary(one["tokenizer.json"]) == _vocabulary(other["tokenizer.json"])
        except (ValueError, KeyError, TypeError):
            return False
    shared = [name for name in one if is_vocabulary(name) and name in other]
    return bool(shared) and all(one[name] == other[name] for name in shared)


def _vocabulary(raw: bytes) -> tuple[object, dict[str, int]]:
    value = json.loads(raw)
    added = {token["content"]: token["id"] for token in value.get("added_tokens") or ()}
    return value["model"]["vocab"], added


def end_of_sequence(files: Mapping[str, bytes]) -> tuple[str, int] | None:
    """Return the token with which a tokenizer ends sequences, and its id; None if its files do not say."""
    try:
        named = json.loads(files[TOKENIZER_CONFIG])["eos_token"]
        text = named["content"] if isinstance(named, dict) else named
        value = json.loads(files["tokenizer.json"])
        numbers = {token["content"]: token["id"] for token in value["added_tokens"]}
        return text, numbers[text]
    except (ValueError, KeyError, TypeError):
        return None


def token_texts(files: Mapping[str, bytes], numbers: Iterable[int]) -> list[str]:
    """Return the text of each added token; its id if the files do not say."""
    try:
        added = json.loads(files["tokenizer.json"])["added_tokens"]
        texts = {token["id"]: token["content"] for token in added}
    except (ValueError, KeyError, TypeError):
        texts = {}
    return [str(texts.get(number, number)) for number in numbers]
