"""Logits of one checkpoint under many configs, by transformers and by this library, computed no oftener than needed.

Each side notes the settings that it reads for the unchanged config. A config whose other settings alone differ gives
the unchanged logits: a program takes the same way through the same values.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import torch
from tiny import VOCABULARY, auto_class, load
from transformers import AutoConfig, PreTrainedConfig

from kithara_ray.hf.checkpoint import NOT_MATHEMATICS, SINGLE, BaseCheckpoint
from kithara_ray.hf.tower import text_of
from kithara_ray.model import causal_lm
from kithara_ray.model.families import family_of
from kithara_ray.model.families.family import Family, completed
from kithara_ray.model.families.tensors import check_tensors
from kithara_ray.sharding.mesh import make_mesh

TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (1, 24)).astype(np.int32)
_ABSENT = "absent"


# --- transformers ----------------------------------------------------------------------------------------------------


def theirs(directory: Path) -> np.ndarray:
    """Logits of transformers. Raises whatever it raises, and ValueError for weights that do not fit."""
    model, loading = load(directory, dtype=torch.float32, output_loading_info=True)
    missing, resized = loading["missing_keys"], loading["mismatched_keys"]
    if missing or resized:
        raise ValueError(f"missing {sorted(missing)[:1]}, of another shape {sorted(resized)[:1]}")
    return _computed(model)


def _computed(model) -> np.ndarray:
    with torch.no_grad():
        logits = model.eval()(torch.tensor(TOKENS).long(), use_cache=False).logits.numpy()
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite")
    return logits


class Theirs:
    """transformers' model of a directory, with its weights in memory.

    Attributes:
        unchanged: its logits.
        reads: names of the attributes of configs that building it and computing them look for.
    """

    def __init__(self, directory: Path, place: Path):
        """`place`: an empty directory for changed configs."""
        self.place = place
        (place / SINGLE).symlink_to(directory / SINGLE)
        loaded = load(directory, dtype=torch.float32)
        # Without the second name of a tied weight.
        first = {tensor.data_ptr(): name for name, tensor in reversed(loaded.state_dict().items())}
        self.weights = {name: tensor for name, tensor in loaded.state_dict().items() if name in first.values()}
        config = AutoConfig.from_pretrained(directory)
        self.kind, self.settings = type(config), _settings(config)
        with _reads_of(PreTrainedConfig) as self.reads:
            self.unchanged = self._run(config)
        np.testing.assert_array_equal(self.unchanged, _computed(loaded))

    def logits(self, config: Mapping[str, Any]) -> np.ndarray:
        """Logits with another config.json. Raises as `theirs`."""
        (self.place / "config.json").write_text(json.dumps(config))
        made = AutoConfig.from_pretrained(self.place)
        settings = _settings(made)
        if type(made) is self.kind and not self.reads & _differing(settings, self.settings):
            return self.unchanged
        return self._run(made)

    def _run(self, config: PreTrainedConfig) -> np.ndarray:
        model = auto_class(config.model_type).from_config(config, dtype=torch.float32)
        held = [tensor.data_ptr() for name, tensor in model.state_dict().items() if name in self.weights]
        loaded = set(held)
        if len(loaded) < len(held):
            # A head and an embedding are tied that have values of their own: transformers says which of them it takes.
            return theirs(self.place)
        missing = model.load_state_dict(self.weights, strict=False).missing_keys
        unfed = [name for name in missing if model.state_dict()[name].data_ptr() not in loaded]
        if unfed:
            raise ValueError(f"missing {unfed[:1]}")
        return _computed(model)


def _settings(config: PreTrainedConfig, of: str = "") -> dict[str, str]:
    """The attributes of a config and of those in it, by path."""
    found: dict[str, str] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= _settings(value, f"{of}{name}.")
        elif name not in NOT_MATHEMATICS:
            found[of + name] = repr(value)
    return found


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    paths = {path for path in {*one, *other} if one.get(path, _ABSENT) != other.get(path, _ABSENT)}
    return {path.rpartition(".")[2] for path in paths}


@contextlib.contextmanager
def _reads_of(kind: type) -> Iterator[set[str]]:
    """Collect the names of the attributes that are looked for on objects of a class, there or not."""
    reads, plain = set(), kind.__getattribute__

    def noting(self, name):
        reads.update((name, object.__getattribute__(self, "attribute_map").get(name, name)))
        return plain(self, name)

    kind.__getattribute__ = noting
    try:
        yield reads
    finally:
        kind.__getattribute__ = plain


# --- this library ----------------------------------------------------------------------------------------------------


class Ours:
    """This library's model of a directory.

    Attributes:
        unchanged: its logits.
    """

    def __init__(self, directory: Path):
        self.base = BaseCheckpoint.open(directory)
        self.reads: set[str] = set()
        self._known: dict[str, np.ndarray] = {}
        self._block: type[keras.Layer] | None = None
        with self._noting():
            self.unchanged = self.logits(self.base.config)
        self._known = {self._key(self.base.config): self.unchanged}

    def check(self, config: Mapping[str, Any]) -> None:
        """Look at what a run looks at before it starts. Raises KitharaRayError."""
        family_of(config)
        check_tensors(self._with(config))

    def logits(self, config: Mapping[str, Any]) -> np.ndarray:
        key = self._key(config)
        if key not in self._known:
            with self._shapes_known():
                model = causal_lm.build(config, None, make_mesh(devices=jax.devices()[:1]), "float32", scan=False)
            if config["model_type"] == "gpt_oss":
                kinds = type(model.model.backbone.transformer_layers[0]).__mro__
                self._block = next(kind for kind in kinds if kind.__module__.startswith("keras_hub."))
            frozen = model.load(self._with(config))
            self._known[key] = np.asarray(model.logits_BTV({}, frozen, TOKENS, np.ones_like(TOKENS)))
        return self._known[key]

    def _with(self, config: Mapping[str, Any]) -> BaseCheckpoint:
        return BaseCheckpoint(self.base.directory, dict(config), self.base.tensors, self.base.files)

    def _key(self, config: Mapping[str, Any]) -> str:
        """Equal for configs of one model: the general block's description, or all fields that KerasHub's is made of."""
        text = text_of(config)
        family = family_of(config)
        whole = completed(family, text)
        description = family.described(whole)
        if description is not None:
            return repr(description)
        return repr([text["model_type"], *((name, whole.get(name, _ABSENT)) for name in sorted(self.reads))])

    @contextlib.contextmanager
    def _shapes_known(self) -> Iterator[None]:
        """Tell Keras the shape of a block's output. It traces gpt_oss' block for it, most of the time of a build."""
        if self._block is None:
            yield
            return
        self._block.compute_output_spec = lambda block, x, *args, **kwargs: keras.KerasTensor(x.shape, x.dtype)
        try:
            yield
        finally:
            del self._block.compute_output_spec

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Note the fields that KerasHub's converter and our corrections of it read."""
        plain = family_of(self.base.config)
        noted = functools.partial(_Noted, self.reads)
        watched = _Watched(
            **{
                **{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)},
                "correct": lambda config, kwargs: plain.correct(noted(config), kwargs),
                "finish": lambda config, backbone: plain.finish(noted(config), backbone),
            }
        )
        object.__setattr__(watched, "noted", noted)
        before = causal_lm.family_of
        causal_lm.family_of = lambda config: watched
        try:
            yield
        finally:
            causal_lm.family_of = before


class _Noted(dict):
    """A config that notes the names of the fields that are looked for, there or not."""

    def __init__(self, reads: set[str], config: Mapping[str, Any]):
        super().__init__(config)
        self.reads = reads

    def __getitem__(self, name):
        self.reads.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.reads.add(name)
        return super().get(name, default)

    def __contains__(self, name):
        self.reads.add(name)
        return super().__contains__(name)

    def __iter__(self):
        """Whoever copies it reads everything."""
        self.reads.update(super().keys())
        return super().__iter__()

    def keys(self):
        self.reads.update(super().keys())
        return super().keys()

    def items(self):
        self.reads.update(super().keys())
        return super().items()


class _Watched(Family):
    def for_converter(self, config: Mapping) -> dict:
        return self.noted(super().for_converter(config))
