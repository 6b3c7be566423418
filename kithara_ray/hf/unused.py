"""Tensors of a checkpoint that transformers does not compute with, and why."""

import re
from collections.abc import Mapping
from typing import Any

from kithara_ray.hf.tower import TOWER, is_in_tower, text_of

_FURTHER = "transformers builds no layers that predict further tokens"
_UNUSED = (
    (re.compile(r"(^|\.)rotary_emb\.inv_freq$"), "transformers computes it from config.json"),
    (re.compile(r"^(model\.)?mtp\."), _FURTHER),
)
# Families in which layers may have no keys and values of their own.
_SHARING = frozenset({"gemma4_text", "gemma4_unified_text"})
_KEYS = re.compile(r"\.layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def why_unused(config: Mapping[str, Any], name: str) -> str | None:
    """Return the reason why transformers ignores a tensor of a checkpoint; None if it may use the tensor."""
    text = text_of(config)
    layers = text.get("num_hidden_layers")
    if layers and text.get("model_type") in _SHARING and _KEYS.search(name) and is_in_tower(config, name):
        if shares_keys(text, layer_of(name) or 0):
            return "its block attends to the keys and values of an earlier one, by num_kv_shared_layers"
    if _predicts_further(config, name):
        return _FURTHER
    return next((reason for pattern, reason in _UNUSED if pattern.search(name)), None)


def _predicts_further(config: Mapping[str, Any], name: str) -> bool:
    """True for a layer behind the model's last, of those that `num_nextn_predict_layers` counts (GLM 4.5)."""
    further, layers, layer = config.get("num_nextn_predict_layers"), layers_of(config), layer_of(name)
    return isinstance(further, int) and layers is not None and layer in range(layers, layers + further)


def shares_keys(text: Mapping[str, Any], layer: int) -> bool:
    """True if a layer of gemma4's text model attends to the keys and values of an earlier one."""
    return layer >= text["num_hidden_layers"] - (text.get("num_kv_shared_layers") or 0)


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
    return (plain or name.startswith(TOWER)) and layers is not None and layer is not None and layer >= layers
