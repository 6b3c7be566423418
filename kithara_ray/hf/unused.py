"""Tensors of a checkpoint that transformers does not compute with, and why."""

import re
from collections.abc import Mapping
from typing import Any

_UNUSED = (
    (re.compile(r"(^|\.)rotary_emb\.inv_freq$"), "transformers computes it from config.json"),
    (re.compile(r"^(model\.)?mtp\."), "transformers builds no layers that predict further tokens"),
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def why_unused(name: str) -> str | None:
    """Return the reason why transformers ignores a tensor of any checkpoint; None if it may use the tensor."""
    return next((reason for pattern, reason in _UNUSED if pattern.search(name)), None)


def layers_of(config: Mapping[str, Any]) -> int | None:
    """Return num_hidden_layers of a text model, or of the text model in a larger one."""
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, Mapping) else {}):
        number = settings.get("num_hidden_layers")
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    return None


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor or a module belongs to."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def is_beyond(config: Mapping[str, Any], name: str) -> bool:
    """True if a name belongs to a layer that config.json does not have: transformers does not build it."""
    layers, layer = layers_of(config), layer_of(name)
    # Encoders next to a text model count their own layers.
    plain = "text_config" not in config and "encoder_layers" not in config
    return plain and layers is not None and layer is not None and layer >= layers
