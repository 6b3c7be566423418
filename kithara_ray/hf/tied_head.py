"""The output head of a causal LM: tied to the token embedding, or a separate tensor. Values decide, not names.

A checkpoint whose config.json ties the head may still hold a tensor for it. If that is a copy of the embedding, nothing
depends on it. If its values differ, readers disagree: transformers 5 computes with the file's head, others with the
embedding.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kithara_ray.errors import CheckpointError
from kithara_ray.hf.checkpoint import CONFIG, EDGE_BYTES, BaseCheckpoint, TensorInfo
from kithara_ray.hf.fetch import read_ranges
from kithara_ray.hf.tower import in_tower, text_of

# Names in a text model by itself.
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Each model_type for which transformers ties the head if config.json has no tie_word_embeddings; False for any other.
TIED_BY_DEFAULT = frozenset(
    {"gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "smollm3", "cohere2", "ernie4_5"}
    | {"ernie4_5_moe", "starcoder2"}
)
_ROWS_BYTES = 16 << 20


def embedding_of(config: Mapping[str, Any]) -> str:
    """Return the name of the token embedding's tensor."""
    return in_tower(config, EMBEDDING)


def is_tied(config: Mapping[str, Any]) -> bool:
    """True if config.json says that the head is the token embedding."""
    text = text_of(config)
    said = text.get("tie_word_embeddings")
    return text.get("model_type") in TIED_BY_DEFAULT if said is None else bool(said)


def check_tied_head(base: BaseCheckpoint) -> None:
    """Refuse a tied head whose tensor differs from the embedding.

    Weights at a URL are compared at both ends and in the middle; local weights are compared whole.

    Raises:
        CheckpointError: config.json ties the head, and the file's head differs from the embedding.
    """
    name = embedding_of(base.config)
    if HEAD not in base.tensors or name not in base.tensors or not is_tied(base.config):
        return
    head, embedding = base.tensors[HEAD], base.tensors[name]
    if head.shape == embedding.shape and _same_values(base, head, embedding):
        return
    raise CheckpointError(
        f"{base.source or base.directory}: {CONFIG} ties the head to the embedding (tie_word_embeddings), but "
        f"{HEAD} {head.shape} differs from {name} {embedding.shape}. transformers computes with {HEAD}, other "
        f'readers with the embedding. If {HEAD} is right, write "tie_word_embeddings": false in {CONFIG}; else take '
        f"{HEAD} out of the weights"
    )


def _same_values(base: BaseCheckpoint, one: TensorInfo, other: TensorInfo) -> bool:
    if base.source:
        return one.dtype != other.dtype or _edges(base.source, one) == _edges(base.source, other)
    left, right = base.view(one.name), base.view(other.name)
    rows = max(1, _ROWS_BYTES // max(1, left[:1].nbytes))
    for begin in range(0, len(left), rows):
        part = slice(begin, begin + rows)
        if left.dtype == right.dtype:
            same = left[part].tobytes() == right[part].tobytes()
        else:
            same = np.array_equal(left[part].astype(np.float64), right[part].astype(np.float64))
        if not same:
            return False
    return True


def _edges(source: str, info: TensorInfo) -> list[bytes]:
    """Read up to 64 KiB at the start, in the middle and at the end of a tensor at a URL."""
    size = min(EDGE_BYTES, info.nbytes)
    begins = (0, (info.nbytes - size) // 2, info.nbytes - size)
    spans = [(info.offset + begin, info.offset + begin + size) for begin in begins]
    return read_ranges(source, info.file.name, spans)
