"""The tokenizer of a run, kept as files beside the trained weights.

Exports take it from there: the run's own exports, exports during the run, and those of `kithara-ray export`.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kithara_ray.hf.model_files import token_texts, write_files
from kithara_ray.orchestration.cluster.remote import head_node_id, remote_get
from kithara_ray.sft.tokens.prompts import Prompting
from kithara_ray.sft.tokens.tokenizer_files import files_of
from kithara_ray.storage.urls import join

logger = logging.getLogger(__name__)

DIRECTORY = "tokenizer"


def prompting_of(dataset: Any) -> Prompting:
    """Return the tokenizer and the chat template of a dataset, or of a mixture."""
    parts = getattr(dataset, "datasets", (dataset,))
    templates = list(dict.fromkeys(part.chat_template for part in parts if part.chat_template is not None))
    if len(templates) > 1:
        logger.warning("the mixture has %d chat templates; exports and generate take the first", len(templates))
    return Prompting(parts[0].tokenizer, templates[0] if templates else None)


def keep(prompting: Prompting, base: str, directories: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Have the head node write the tokenizer's files into `tokenizer/` of each directory; the directories are its own.

    Args:
        base: the base's handle. The end tokens of the answers are added to its generation settings.
        directories: paths or URLs. If there are none, the head node keeps the files in its temporary directory.

    Returns: the files' location, and the tokenizer's entry in run.json.

    Raises:
        DataError: there is no tokenizer.
        DestinationError: a directory cannot be written.
    """
    head = head_node_id() or ray.get_runtime_context().get_node_id()
    on_head = NodeAffinitySchedulingStrategy(head, soft=False)
    return remote_get(_keep.options(scheduling_strategy=on_head).remote(prompting, base, tuple(directories)))


@ray.remote(num_cpus=0, max_retries=0)
def _keep(prompting: Prompting, base: str, directories: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    files = files_of(prompting, base)
    places = [join(directory, DIRECTORY) for directory in directories]
    places = places or [tempfile.mkdtemp(prefix="kithara_ray_tokenizer_")]
    for place in places:
        write_files(place, files)
    return places[0], _facts(prompting, files)


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
