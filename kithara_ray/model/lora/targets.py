"""Modules of a checkpoint that LoRA can adapt, from its files only: no jax, no keras, so the driver can check early."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf import beside
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_checks import ALL_LINEAR
from kithara_ray.hf.lora_config import is_named

_WEIGHT = ".weight"
_EMBEDDINGS = ("embed_tokens", "lm_head")
_ROUTERS = ("gate", "router")
_EXPERTS = ".experts."
# Mixtures whose experts PEFT does not adapt by an expert's name.
_BY_LAYER = ("qwen3_5_moe_text", "qwen3_5_moe")


def linear_modules_of(base: BaseCheckpoint) -> list[str]:
    """List modules with a matrix that are linear layers in transformers, except the head."""
    matrices = (name for name, info in base.tensors.items() if name.endswith(_WEIGHT) and len(info.shape) == 2)
    return sorted(linear((name.removesuffix(_WEIGHT) for name in matrices), base.config))


def linear(modules: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Select, from a checkpoint's modules with a matrix, the linear layers in transformers, except the head.

    The experts and the router of a mixture are not selected. Transformers holds all experts in one parameter, and PEFT
    takes an expert's name ("up_proj") for that parameter, even if a layer has the same name. Only in `_BY_LAYER` it
    takes the name for the layer.

    Args:
        config: config.json.
    """
    modules = list(modules)
    apart = {*_EMBEDDINGS, *_ROUTERS}
    if config.get("model_type") not in _BY_LAYER:
        apart |= {_leaf(module) for module in modules if _EXPERTS in module}
    return [module for module in modules if _leaf(module) not in apart and _EXPERTS not in module]


def other_modules_of(base: BaseCheckpoint) -> list[str]:
    """List modules that PEFT considers but that are not linear layers: embedding, head, norms, blocks and their parts.

    A target that matches one of them is an error in PEFT, or an adapter that this library does not have.
    """
    linear = set(linear_modules_of(base))
    names = base.tensors
    if base.config.get("model_type") in _BY_LAYER:
        # An expert is no module, but a part of a parameter.
        names = [name for name in names if _EXPERTS not in name]
    modules = {name.rpartition(".")[0] for name in names}
    parents = {module[: match.start()] for module in modules for match in re.finditer(r"\.", module)}
    # A tied head is a module without a tensor; activations and rotary embeddings never have one.
    activations = {f"{module}.act_fn" for module in parents if module.endswith(".mlp")}
    return sorted((modules | parents | activations | {"lm_head", "model.rotary_emb"}) - linear)


def targets_of(given: str | Iterable[str], base: BaseCheckpoint) -> tuple[str, ...] | str:
    """Convert a user's `target_modules` to LoraConfig's form: "all-linear" and one name become lists of names."""
    if not isinstance(given, str):
        return tuple(given)
    if given.lower() == ALL_LINEAR:
        return tuple(sorted({_leaf(module) for module in linear_modules_of(base)}))
    return (given,) if re.fullmatch(r"[\w.]+", given) else given


def lora_config_of(rank: int, base: BaseCheckpoint, **settings: Any) -> LoraConfig:
    """Build the LoraConfig from the user's settings, with "all-linear" expanded.

    Raises:
        ConfigError: a setting is wrong, or names a module that does not exist.
        UnsupportedError: this library does not draw the requested initialisation.
    """
    targets = targets_of(settings.pop("target_modules"), base)
    if settings["init_lora_weights"] is False:
        raise UnsupportedError("init_lora_weights=False (a random B) is for testing PEFT; use True or 'gaussian'")
    patterns = {name: settings.pop(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    lora = LoraConfig(r=rank, target_modules=targets, **patterns, **settings)
    lora = dataclasses.replace(lora, **beside.normal(lora, base))
    if lora.bias != "none" and not any(one.tensor.endswith(beside.BIAS) for one in beside.of_base(lora, base)):
        raise ConfigError(f"bias={lora.bias!r}: none of these layers has a bias in this base; leave it out")
    linear_modules, others = linear_modules_of(base), other_modules_of(base)
    check_selection(lora, linear_modules, others)
    check_targets(lora, linear_modules, others)
    return lora


def check_targets(config: LoraConfig, modules: Sequence[str], others: Sequence[str] = ()) -> None:
    """Check that every target matches a linear module and none of the `others`, and that some modules are selected.

    Raises:
        ConfigError: names the entry and the available modules.
    """
    targets = config.target_modules
    for target in [targets] if isinstance(targets, str) else targets:
        entry = targets if isinstance(targets, str) else (target,)
        one = dataclasses.replace(config, target_modules=entry)
        wrong = next((module for module in others if one.matches(module)), None)
        if wrong is not None:
            what = "an embedding" if _leaf(wrong) in _EMBEDDINGS else "no linear layer"
            if _EXPERTS in wrong or _leaf(wrong) in _ROUTERS:
                what = "of a mixture of experts, which transformers holds as parameters"
            raise ConfigError(f"target_modules: {target!r} matches {wrong}, {what}; LoRA adapts linear layers alone")
        if not any(is_named(entry, module) for module in modules):
            leaves = sorted({_leaf(module) for module in modules})
            how = "as a regular expression, over its whole name, " if isinstance(targets, str) else ""
            raise ConfigError(
                f"target_modules: {target!r} {how}matches no linear layer of this model; it has {', '.join(leaves)}"
            )

    if not any(config.matches(module) for module in modules):
        fields = ("exclude_modules", "layers_to_transform", "layers_pattern")
        given = [f"{name}={getattr(config, name)!r}" for name in fields if getattr(config, name) is not None]
        raise ConfigError(
            f"{', '.join(given)}: nothing is left of target_modules={targets!r}; select less, or leave out"
        )


def check_selection(config: LoraConfig, modules: Sequence[str], others: Sequence[str]) -> None:
    """Check that each entry of `exclude_modules` and `layers_to_transform` exists; PEFT ignores a missing one silently.

    Raises:
        ConfigError: names the entry and the available ones.
    """
    excluded = config.exclude_modules or ()
    for entry in [excluded] if isinstance(excluded, str) else excluded:
        if not any(is_named(entry if isinstance(excluded, str) else (entry,), name) for name in (*modules, *others)):
            leaves = sorted({_leaf(module) for module in modules})
            raise ConfigError(
                f"exclude_modules: {entry!r} matches no module of this model; it has {', '.join(leaves)}; leave it out"
            )
    layers = {config.layer_of(module) for module in modules} - {None}
    unknown = sorted(set(config.layers_to_transform or ()) - layers)
    if unknown:
        there = f"layers {min(layers)} to {max(layers)}" if layers else "no layer that is named so"
        pattern = f" with layers_pattern={list(config.layers_pattern)}" if config.layers_pattern else ""
        raise ConfigError(f"layers_to_transform: no layer {unknown[0]}{pattern}; this model has {there}")


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
