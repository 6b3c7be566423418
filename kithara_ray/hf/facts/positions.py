"""The longest sequence that a base was made for, according to its config.json."""

from collections.abc import Mapping
from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length")
# Kinds of rope scaling for which config.json already gives the scaled length.
_SCALED = ("default", "llama3", "longrope", "su", "mrope", "proportional")


def max_positions(config: Mapping[str, Any]) -> int | None:
    """Return the tokens of the longest sequence, rope scaling included; None if config.json does not say.

    Linear, dynamic and YaRN scaling multiply the length before scaling by `factor`. YaRN may give that length as
    `original_max_position_embeddings`.
    """
    text = config.get("text_config") or config
    length = next((text[name] for name in _NAMES if isinstance(text.get(name), int)), None)
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind, factor = scaling.get("rope_type") or scaling.get("type"), scaling.get("factor")
    if length is None or kind is None or kind in _SCALED or not isinstance(factor, (int, float)):
        return length
    original = scaling.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(length, int((original or length) * factor)) if original else int(length * factor)
