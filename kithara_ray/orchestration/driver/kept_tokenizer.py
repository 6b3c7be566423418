"""The tokenizer of a run, kept as files beside the trained weights.

Exports take it from there: the run's own exports, exports during the run, and those of `kithara-ray export`.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kithara_ray.hf.model_files import token_texts
from kithara_ray.sft.tokens.prompts import Prompting
from kithara_ray.sft.tokens.tokenizer_files import files_of
from kithara_ray.storage.urls import join

logger = logging.getLogger(__name__)

DIRECTORY = "tokenizer"
# Files by name, and the directories to write all of them to -> the first of these.
Write = Callable[[Mapping[str, bytes], Sequence[str]], str]


def prompting_of(dataset: Any) -> Prompting:
    """Return the tokenizer and the chat template of a dataset, or of a mixture."""
    parts = getattr(dataset, "datasets", (dataset,))
    templates = list(dict.fromkeys(part.chat_template for part in parts if part.chat_template is not None))
    if len(templates) > 1:
        logger.warning("the mixture has %d chat templates; exports and generate take the first", len(templates))
    return Prompting(parts[0].tokenizer, templates[0] if templates else None)


def keep(prompting: Prompting, base: str, directories: Sequence[str], write: Write) -> tuple[str, dict[str, Any]]:
    """Write the tokenizer's files into `tokenizer/` of each directory. They are made here, as the tokenizer is loaded.

    Args:
        base: the base's handle. The end tokens of the answers are added to its generation settings.
        directories: paths or URLs. If there are none, a temporary directory keeps the files.
        write: writes the files on the node whose directories these are, see `Coordinator.keep_files`.

    Returns: the files' location, and the tokenizer's entry in run.json.

    Raises:
        DataError: there is no tokenizer.
        DestinationError: a directory cannot be written.
    """
    files = files_of(prompting, base)
    return write(files, [join(directory, DIRECTORY) for directory in directories]), _facts(prompting, files)


def _facts(prompting: Prompting, files: dict[str, bytes]) -> dict[str, Any]:
    """Return hashes of vocabulary, chat template and files, and the ends of trained answers."""
    tokenizer, template = prompting.loaded(), prompting.chat_template
    template = getattr(tokenizer, "chat_template", None) if template is None else template
    handle = prompting.tokenizer
    return {
        "tokenizer": handle if isinstance(handle, str) else getattr(handle, "name_or_path", None),
        "vocabulary_sha256": _sha256(sorted(tokenizer.get_vocab().items())),
        "chat_template_sha256": None if template is None else _sha256(template),
        "answers_end_with": token_texts(files, prompting.ends),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }


def _sha256(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
