"""Change a model's config.json or its tensors in one place, and compare what transformers and this library make of it.

The judge is transformers: it loads the same weights with the changed file. A change is

    equal      both compute the same logits,
    refused    this library refuses it, from config.json and the weights' headers alone,
    skipped    transformers raises, or the weights no longer fit its model,
    different  a silent fault.
"""

import contextlib
import copy
import functools
import importlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import torch
from tiny import MULTIMODAL, SIZES, VOCABULARY, model_type
from transformers import AutoConfig, AutoModelForCausalLM

from kithara_ray.errors import CheckpointError, KitharaRayError, UnsupportedError
from kithara_ray.hf.checkpoint import NOT_MATHEMATICS, BaseCheckpoint
from kithara_ray.model import keras_compat
from kithara_ray.model.causal_lm import build
from kithara_ray.model.families import FAMILIES, family_of
from kithara_ray.model.families.tensors import check_tensors
from kithara_ray.sharding.mesh import make_mesh

EQUAL, REFUSED, SKIPPED, DIFFERENT = "equal", "refused", "skipped", "different"
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (1, 24)).astype(np.int32)
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


# --- the two sides ---------------------------------------------------------------------------------------------------


def theirs(directory: Path) -> np.ndarray:
    """Logits of transformers. Raises whatever it raises, and ValueError for weights that do not fit."""
    model, loading = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    missing, resized = loading["missing_keys"], loading["mismatched_keys"]
    if missing or resized:
        raise ValueError(f"missing {sorted(missing)[:1]}, of another shape {sorted(resized)[:1]}")
    with torch.no_grad():
        logits = model.eval()(torch.tensor(TOKENS).long(), use_cache=False).logits.numpy()
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite")
    return logits


def check(directory: Path) -> BaseCheckpoint:
    """Look at what a run looks at before it starts. Raises KitharaRayError."""
    base = BaseCheckpoint.open(directory)
    family_of(base.config)
    check_tensors(base)
    return base


def ours(base: BaseCheckpoint) -> np.ndarray:
    model = build(base.config, None, make_mesh(devices=jax.devices()[:1]), "float32", scan=False)
    return np.asarray(model.logits_BTV({}, model.load(base), TOKENS, np.ones_like(TOKENS)))


def judge(change: str, directory: Path, unchanged: np.ndarray, reads: bool = True) -> Verdict:
    """Compare both sides on a changed directory.

    Args:
        unchanged: the logits of both before the change.
        reads: False if nothing here names the changed field, so that our logits are the unchanged ones.
    """
    try:
        wanted = theirs(directory)
    except Exception as error:
        return Verdict(change, SKIPPED, f"{type(error).__name__}: {error}"[:200])
    moved = not np.allclose(wanted, unchanged, atol=ATOL, rtol=0)
    try:
        base = check(directory)
    except (UnsupportedError, CheckpointError) as error:
        return Verdict(change, REFUSED, str(error), moved)
    try:
        found = ours(base) if reads else unchanged
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
            layers = config["num_hidden_layers"]
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


# --- names that a side's code has; a field that it does not name cannot change what it computes ----------------------


def _words(*places: Path | ModuleType) -> set[str]:
    words: set[str] = set()
    for place in places:
        path = Path(str(place.__file__)) if isinstance(place, ModuleType) else place
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            words.update(re.findall(r"\w+", file.read_text(encoding="utf-8")))
    return words


@functools.cache
def words_of_ours(family: str) -> set[str]:
    """Words of the modules that define the family, of those that they import, and of KerasHub's converter."""
    parts = [part for part in vars(FAMILIES[family]).values() if callable(part)]
    waiting, modules = [part.__module__ for part in parts], {}
    while waiting:
        name = waiting.pop()
        if name in modules or not name.startswith("kithara_ray.model."):
            continue
        modules[name] = importlib.import_module(name)
        if name != "kithara_ray.model.families":  # which imports all families
            source = Path(str(modules[name].__file__)).read_text(encoding="utf-8")
            waiting += re.findall(r"^ *(?:from|import) (kithara_ray\.model\.[\w.]+)", source, re.MULTILINE)
    if converter := FAMILIES[family].converter:
        modules[converter] = keras_compat.converter_of(converter)
    return _words(*modules.values())


@functools.cache
def words_of_theirs(family: str) -> set[str]:
    config = AutoConfig.for_model(family)
    package = Path(str(importlib.import_module(type(config).__module__).__file__)).parent
    shared = ("masking_utils", "modeling_rope_utils", "configuration_utils", "modeling_utils", "modeling_layers")
    shared = (*shared, "models.auto.configuration_auto", "models.auto.auto_factory", "integrations.sdpa_attention")
    return _words(package, *(importlib.import_module(f"transformers.{name}") for name in shared))


# --- the sweeps ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def variant(directory: Path, place: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """A copy of a model's directory with another config.json; the weights are the same file."""
    place.mkdir()
    try:
        os.link(directory / "model.safetensors", place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(config))
        yield place
    finally:
        shutil.rmtree(place)


def sweep_fields(
    family: str, directory: Path, place: Path, only: str | None = None, each_once: bool = False
) -> list[Verdict]:
    """Judge every change of one field of a family's model.

    Args:
        only: the one field to change.
        each_once: take the first change of each field.
    """
    config = json.loads((directory / "config.json").read_text())
    unchanged = theirs(directory)
    np.testing.assert_allclose(ours(check(directory)), unchanged, atol=ATOL, rtol=0)
    verdicts, done = [], set()
    for name, change, changed in changes(config):
        if (only is not None and name != only) or (each_once and name in done):
            continue
        done.add(name)
        reads = name in words_of_ours(family)
        if not reads and name not in words_of_theirs(family):
            verdicts.append(Verdict(change, EQUAL, "neither side names it"))
            continue
        with variant(directory, place, changed) as there:
            verdicts.append(judge(change, there, unchanged, reads))
    return verdicts
