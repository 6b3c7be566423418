"""How long a sequence a base was made for, by its config.json."""

from collections.abc import Mapping
from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length")
# Kinds of rope scaling after which config.json says the scaled length already.
_SCALED = ("default", "llama3", "longrope", "su", "mrope", "proportional")


def max_positions(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest sequence, rope scaling included; None where config.json does not say.

    Linear, dynamic and YaRN scaling multiply the length before scaling by `factor`; YaRN names that length
    `original_max_position_embeddings`, where it differs from the other's.
    """
    text = config.get("text_config") or config
    length = next((text[name] for name in _NAMES if isinstance(text.get(name), int)), None)
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind, factor = scaling.get("rope_type") or scaling.get("type"), scaling.get("factor")
    if length is None or kind is None or kind in _SCALED or not isinstance(factor, (int, float)):
        return length
    original = scaling.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(length, int((original or length) * factor)) if original else int(length * factor)
