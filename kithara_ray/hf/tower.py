"""The text model inside a multimodal checkpoint: its config, the names of its tensors, and the parts beside it.

transformers builds the whole model for such a checkpoint in AutoModelForImageTextToText, and mostly also in
AutoModelForCausalLM. An adapter therefore has the names of the whole model (`model.language_model.layers...`), and so
has everything here. A weight file may have other names, mostly older ones; `renamed` converts them. A text model by
itself is named `model.layers...`.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kithara_ray.errors import CheckpointError, UnsupportedError
from kithara_ray.hf.safetensors_file import TensorInfo

ALONE = "model."
TOWER = "model.language_model."
_HEAD = "lm_head."
# Names in files, and the names of transformers' modules. Files of gemma3 and mistral3 have the older ones.
_RENAMED = (
    (re.compile(r"^language_model\.lm_head\."), _HEAD),
    (re.compile(r"^language_model\.(model\.)?"), TOWER),
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^multi_modal_projector\."), "model.multi_modal_projector."),
)
# Names in files of `Wrapper.flat`, where only the vision tower stands apart.
_RENAMED_FLAT = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), TOWER),
)


@dataclass(frozen=True)
class Wrapper:
    """One `model_type` of a multimodal model whose text model is at `model.language_model`.

    Attributes:
        text: the `model_type` of its text model, if `text_config` does not say or says `alias`.
        beside: the parts of `model` beside the text model. They are copied, never built or trained.
        tied: True if transformers ties the head when config.json has no tie_word_embeddings; None if the text model's
            config decides then.
        alias: another `model_type` for `text`, with other defaults. Positions of a text are the same in all three
            directions of its rotation, so it computes the same.
        defaults: fields of the text model that the alias fills in with other values than `text`.
        fixed: fields of `text` that the alias does not read, with the values that it computes with.
        flat: True if published files have the text model's fields at the top of config.json, and its tensors without
            `language_model`. A text_config may then tie the head too.
    """

    text: str
    beside: tuple[str, ...]
    tied: bool | None = True
    alias: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    flat: bool = False


_QWEN2_VL = {"rms_norm_eps": 1e-5, "max_window_layers": 80, "rope_theta": 1_000_000.0, "num_key_value_heads": 8}
_QWEN3_VL = {"rope_theta": 500_000.0, "num_key_value_heads": 32}
WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper("gemma3_text", ("vision_tower", "multi_modal_projector")),
    "gemma4": Wrapper("gemma4_text", ("vision_tower", "embed_vision", "audio_tower", "embed_audio")),
    # Its published files name parts of embed_vision otherwise.
    "gemma4_unified": Wrapper("gemma4_unified_text", ("vision_embedder", "embed_vision", "embed_audio")),
    # transformers ties its head without asking, unless the file has one: as text_config says in all published files.
    "mistral3": Wrapper("mistral", ("vision_tower", "multi_modal_projector"), tied=None),
    "qwen2_vl": Wrapper("qwen2", ("visual",), False, "qwen2_vl_text", _QWEN2_VL, flat=True),
    "qwen2_5_vl": Wrapper("qwen2", ("visual",), False, "qwen2_5_vl_text", _QWEN2_VL, flat=True),
    "qwen3_vl": Wrapper("qwen3", ("visual",), False, "qwen3_vl_text", _QWEN3_VL, {"use_sliding_window": False}),
    "qwen3_5": Wrapper("qwen3_5_text", ("visual",), tied=False),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text", ("visual",), tied=False),
}


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """Return the wrapper that a config.json describes; None for a text model, and for an unknown wrapper."""
    model_type = config.get("model_type")
    return WRAPPERS.get(model_type) if isinstance(model_type, str) else None


def text_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text model, with the fields that a wrapper decides for it; a text model's own as it is.

    Raises:
        UnsupportedError: a wrapper has no text_config.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        return dict(config)
    given = config.get("text_config")
    if given is None and wrapper.flat:
        given = {name: value for name, value in config.items() if name not in ("model_type", "vision_config")}
    if not isinstance(given, Mapping):
        raise UnsupportedError(
            f"config.json: this {config['model_type']} model has no text_config (found {given!r}); "
            "write it anew with transformers' save_pretrained"
        )
    text = {"model_type": wrapper.text, **given}
    if wrapper.alias is not None and given.get("model_type", wrapper.alias) == wrapper.alias:
        text = {**wrapper.defaults, **text, **wrapper.fixed, "model_type": wrapper.text}
    # transformers reads these of the whole model.
    tied = config.get("tie_word_embeddings")
    tied = wrapper.tied if tied is None else tied
    if wrapper.flat and given.get("tie_word_embeddings"):
        tied = True
    if tied is not None:
        text["tie_word_embeddings"] = tied
    of_all = ("dtype", "torch_dtype", "quantization_config")
    return text | {name: config[name] for name in of_all if config.get(name) is not None}


def prefix_of(config: Mapping[str, Any]) -> str:
    """Return the start of the names of the text model's tensors, except its head."""
    return TOWER if wrapper_of(config) else ALONE


def in_tower(config: Mapping[str, Any], name: str) -> str:
    """Convert the name that a tensor or a module has in a text model by itself to its name in the model of `config`."""
    return name if name.startswith(_HEAD) else prefix_of(config) + name.removeprefix(ALONE)


def is_in_tower(config: Mapping[str, Any], name: str) -> bool:
    """True if a tensor or a module belongs to the text model, which may be the whole model."""
    return wrapper_of(config) is None or name.startswith((TOWER, _HEAD)) or name == _HEAD.removesuffix(".")


def is_beside(config: Mapping[str, Any], name: str) -> bool:
    """True if a tensor belongs to a part of a multimodal model that is copied as it is."""
    wrapper = wrapper_of(config)
    return wrapper is not None and name.startswith(tuple(f"{ALONE}{part}." for part in wrapper.beside))


def name_of(config: Mapping[str, Any], name: str) -> str:
    """Convert a tensor's or a module's name, as a file has it, to the name of transformers' module."""
    wrapper = wrapper_of(config)
    if wrapper is None:
        return name
    patterns = _RENAMED_FLAT if wrapper.flat else _RENAMED
    return next((pattern.sub(new, name) for pattern, new in patterns if pattern.search(name)), name)


def renamed(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return a file's tensors by the names of transformers' modules; `stored` keeps the names in the file.

    Raises:
        CheckpointError: two tensors of the file get one name.
    """
    made: dict[str, TensorInfo] = {}
    for stored, info in infos.items():
        name = name_of(config, stored)
        if name in made:
            raise CheckpointError(
                f"{info.file}: {made[name].stored!r} and {stored!r} are both {name!r}; save the model again"
            )
        made[name] = info if name == stored else dataclasses.replace(info, name=name, stored=stored)
    return made
