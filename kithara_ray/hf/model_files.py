"""The files of a model directory by kind, and the ones that travel with an export.

weights, configuration    written by the export
tokenizer                 those of the training, else the base's
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

# Without one of these no tokenizer loads.
_TOKENIZERS = ("tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model", "tekken.json")
# A vocabulary, and nothing that a training may set otherwise.
_VOCABULARIES = ("*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "vocab.bpe")
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", f"{TEMPLATES}/*.jinja"),
    *_VOCABULARIES,
)
_PROCESSOR_FILES = ("processor_config.json", "*preprocessor_config.json")
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# Data that a model brings beside what is listed above.
_DATA_FILES = ("*.json", "*.jinja", "*.txt")
# Data that says nothing of the export: what it writes itself, other adapters and formats, traces of a training.
_NOT_OF_A_MODEL = (
    *("config.json", "*.index.json", "params.json", "adapter_config.json", "run.json", "export_report.json"),
    *("trainer_state.json", "training_args*", "*_results.json", "optimizer*", "scheduler*", "requirements*.txt"),
)
# Never taken from anywhere: code, pickles and the formats of other loaders.
REFUSED_FILES = (
    "*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "consolidated*",
)  # fmt: skip


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file's path in a model directory is one of `patterns`; `*` does not reach into a subdirectory."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_refused(name: str) -> bool:
    return matches(name.rpartition("/")[2], REFUSED_FILES)


def is_tokenizer_file(name: str) -> bool:
    return matches(name, _TOKENIZER_FILES) and not is_refused(name)


def is_vocabulary(name: str) -> bool:
    """Of a tokenizer's files, one that holds a vocabulary alone."""
    return matches(name, _VOCABULARIES)


def is_carried(name: str, with_model: bool) -> bool:
    """Whether a base's file is copied into an export that holds a whole model, or an adapter alone."""
    patterns = (*_TOKENIZER_FILES, *_PROCESSOR_FILES, *LICENCE_FILES)
    if with_model and not matches(name, _NOT_OF_A_MODEL):
        patterns = (*patterns, *_DATA_FILES)
    return matches(name, patterns) and not is_refused(name)


def names_in(directory: Path) -> list[str]:
    """Every file below a local directory, by its path in it."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def has_tokenizer(location: str) -> bool:
    """Whether a tokenizer's files are in a directory or at a URL."""
    return bool(set(Place(str(location)).files("")) & set(_TOKENIZERS))


def read_tokenizer(location: str) -> dict[str, bytes]:
    """The tokenizer's files in a directory or at a URL, and the generation settings beside them; {} without any.

    These stand for the tokenizer that a model was trained with: in a run's `tokenizer/`, or beside a PEFT adapter.
    """
    place = Place(str(location))
    names = [*place.files(""), *(f"{TEMPLATES}/{name}" for name in place.files(TEMPLATES))]
    if not set(names) & set(_TOKENIZERS):
        return {}
    wanted = [name for name in sorted(names) if is_tokenizer_file(name) or name == GENERATION]
    return {name: place.read(*_parts(name)) for name in wanted}


def write_files(location: str, files: Mapping[str, bytes]) -> None:
    """Put files into a directory or at a URL, in place of all that is there. Raises DestinationError."""
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
    """Whether two tokenizers' files give each token the same id, as far as both are written in a format read here."""
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
    """The token with which a tokenizer ends sequences, and its id; None where its files do not tell."""
    try:
        named = json.loads(files[TOKENIZER_CONFIG])["eos_token"]
        text = named["content"] if isinstance(named, dict) else named
        value = json.loads(files["tokenizer.json"])
        numbers = {token["content"]: token["id"] for token in value["added_tokens"]}
        return text, numbers[text]
    except (ValueError, KeyError, TypeError):
        return None


def token_texts(files: Mapping[str, bytes], numbers: Iterable[int]) -> list[str]:
    """Added tokens by their text; an id where the files do not tell."""
    try:
        added = json.loads(files["tokenizer.json"])["added_tokens"]
        texts = {token["id"]: token["content"] for token in added}
    except (ValueError, KeyError, TypeError):
        texts = {}
    return [str(texts.get(number, number)) for number in numbers]
