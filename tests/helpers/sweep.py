"""Change a model's config.json or its tensors in one place, and compare what transformers and this library make of it.

The judge is transformers: it loads the same weights with the changed file. A change is

    equal      both compute the same logits,
    refused    this library refuses it, from config.json and the weights' headers alone,
    skipped    transformers raises, or the weights no longer fit its model,
    different  a silent fault.
"""

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sides import Ours, Theirs
from tiny import MULTIMODAL, SIZES, model_type, text_size
from transformers import AutoConfig

from kithara_ray.errors import CheckpointError, KitharaRayError, UnsupportedError
from kithara_ray.hf.checkpoint import NOT_MATHEMATICS

EQUAL, REFUSED, SKIPPED, DIFFERENT = "equal", "refused", "skipped", "different"
ATOL = 1e-4


@dataclass(frozen=True)
class Verdict:
    """One change, and how it ended.

    Attributes:
        moved: True if transformers' logits changed with it.
    """

    change: str
    outcome: str
    detail: str = ""
    moved: bool = False


@dataclass(frozen=True)
class Sides:
    """Both sides of one directory, equal before anything is changed."""

    theirs: Theirs
    ours: Ours

    @classmethod
    def of(cls, directory: Path, place: Path) -> "Sides":
        """`place`: a directory to be made, for changed configs."""
        place.mkdir()
        sides = cls(Theirs(directory, place), Ours(directory))
        np.testing.assert_allclose(sides.ours.unchanged, sides.theirs.unchanged, atol=ATOL, rtol=0)
        return sides

    def judge(self, change: str, config: Mapping[str, Any]) -> Verdict:
        """Compare both under another config.json."""
        try:
            self.ours.check(config)
        except (UnsupportedError, CheckpointError) as error:
            return Verdict(change, REFUSED, str(error))
        try:
            wanted = self.theirs.logits(config)
        except Exception as error:
            return Verdict(change, SKIPPED, f"{type(error).__name__}: {error}"[:200])
        moved = not np.allclose(wanted, self.theirs.unchanged, atol=ATOL, rtol=0)
        try:
            found = self.ours.logits(config)
        except KitharaRayError as error:
            return Verdict(change, DIFFERENT, f"accepted, and refused when it was built: {error}", moved)
        off = float(np.abs(found - wanted).max())
        return Verdict(change, EQUAL if off <= ATOL else DIFFERENT, f"off by {off:.2g}", moved)


# --- changed fields --------------------------------------------------------------------------------------------------

_ROPES = (
    dict(rope_type="linear", factor=2.0),
    dict(rope_type="dynamic", factor=2.0),
    dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
    dict(
        rope_type="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8,
    ),
    dict(rope_type="proportional", partial_rotary_factor=0.5),
)
# Names that transformers' shared code or its config classes look for, in any config.json.
_ANYWHERE: dict[str, list[Any]] = {
    "is_causal": [False, None],
    "partial_rotary_factor": [0.5],
    "attention_chunk_size": [4],
    "original_max_position_embeddings": [8],
    "rope_theta": [77.0],
    "rope_scaling": [*_ROPES, {"type": "linear", "factor": 2.0}],
    "rope_local_base_freq": [77.0],
    "tie_word_embeddings": [True, False, None],
    "pretraining_tp": [4],
    "attention_dropout": [0.5],
    "attention_bias": [True, None],
    "mlp_bias": [True],
    "head_dim": [8, None],
    "sliding_window": [4, None],
    "use_sliding_window": [True],
    "max_window_layers": [1],
    "sliding_window_pattern": [2],
    "hidden_act": ["gelu", "relu"],
    "hidden_activation": ["silu", "relu"],
    "logits_scaling": [2.0],
    "logit_scale": [0.5],
    "residual_multiplier": [0.5],
    "embedding_multiplier": [2.0],
    "attention_multiplier": [0.5],
    "clip_qkv": [0.1],
    "use_qk_norm": [True],
    "attn_logit_softcapping": [1.0],
    "final_logit_softcapping": [1.0],
    "query_pre_attn_scalar": [5],
    "use_bidirectional_attention": [True],
    "chunk_size_feed_forward": [2],
}
_KINDS = ("sliding_attention", "full_attention")
_STRINGS = {"rope_type": ["linear", "dynamic"], "type": ["linear"], "layer_types": _KINDS, "_act": ["gelu", "relu"]}
_UNTOUCHED = NOT_MATHEMATICS | {"model_type", "id2label", "label2id", "quantization_config"}


def others(name: str, value: Any) -> Iterator[Any]:
    """Other values of a field, by the type of its value."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from sorted({value + 1, 7} - {value})
    elif isinstance(value, float):
        yield value * 2 + 0.1
    elif isinstance(value, str):
        known = next((texts for ending, texts in _STRINGS.items() if name.endswith(ending)), (f"{value}_other",))
        yield from (text for text in known if text != value)
    elif isinstance(value, list) and value:
        for other in others(name, value[0]):
            yield [other, *value[1:]]
        yield [*value[1:], value[0]]
    elif isinstance(value, dict) and value:
        for key, inner in value.items():
            for other in others(key, inner):
                yield {**value, key: other}
            yield {kept: value[kept] for kept in value if kept != key}
        if "rope_type" in value:
            yield from ({**value, **rope} for rope in (*_ROPES, {"partial_rotary_factor": 0.5}))
    elif value is None:
        yield from (True, 4, 0.5)


@functools.cache
def examples() -> Mapping[str, Any]:
    """A value of every field that the config class of any family of text has."""
    found: dict[str, Any] = {}
    for family in sorted(SIZES.keys() - MULTIMODAL):
        found |= AutoConfig.for_model(model_type(family), **copy.deepcopy(SIZES[family])).to_dict()
    return found


def changes(config: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (field, description, config) for each change of one field: its own, left out, or of another family."""
    whole = {**AutoConfig.for_model(**copy.deepcopy(dict(config))).to_dict(), **config}
    for name in sorted({*whole, *examples(), *_ANYWHERE} - _UNTOUCHED):
        values = list(_ANYWHERE.get(name, ()))
        if name in whole:
            values += others(name, whole[name])
        elif name == "layer_types":
            layers = config.get("num_hidden_layers", 2)
            values += [[_KINDS[0]] * layers, [_KINDS[1]] * layers, [_KINDS[i % 2] for i in range(layers)], None]
        elif name in examples() and not values:
            values = [examples()[name], *others(name, examples()[name])][:2]
        seen = [whole.get(name, ...)]
        for value in values:
            if value not in seen:
                seen.append(value)
                yield name, f"{name}={json.dumps(value)}", {**config, name: value}
        if name in config:
            yield name, f"{name} left out", {kept: config[kept] for kept in config if kept != name}


def shallow(family: str) -> dict[str, Any]:
    """Fields that leave a family's text model a block of each kind, or two of one: enough for a field to show."""
    size = text_size(family)
    kinds = list(dict.fromkeys(size.get("layer_types", (None, None)))) * 2
    blocks = max(2, len(kinds) if size.get("num_kv_shared_layers") else len(kinds) // 2)
    fields: dict[str, Any] = {"num_hidden_layers": blocks}
    if "layer_types" in size:
        fields["layer_types"] = kinds[:blocks]
    if size.get("num_kv_shared_layers"):
        fields["num_kv_shared_layers"] = blocks // 2
    return fields


def changes_of_all(config: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """`changes`, and of a multimodal model's config those of its own fields, and one of each field of its text model's.

    The text model's own family has the others.
    """
    text, done = config.get("text_config"), set()
    for name, change, changed in changes(config):
        if text is None or not name.endswith("_config"):
            yield name, change, changed
    for name, change, changed in changes(text) if text is not None else ():
        if name not in done:
            done.add(name)
            yield name, f"text_config: {change}", {**config, "text_config": changed}


def sweep_fields(directory: Path, place: Path, only: str | None = None) -> list[Verdict]:
    """Judge every change of one field of a model's config.json, or those of one field.

    Args:
        place: a directory to be made, for changed configs.
    """
    config = json.loads((directory / "config.json").read_text())
    sides = Sides.of(directory, place)
    found = [each for each in changes_of_all(config) if only in (None, each[0])]
    return [sides.judge(change, changed) for _, change, changed in found]
