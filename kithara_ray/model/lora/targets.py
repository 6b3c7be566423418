"""Modules of a checkpoint that LoRA can adapt, from its files only: no jax, no keras, so the driver can check early."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf import beside
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.experts import former_names, is_router
from kithara_ray.hf.lora_checks import ALL_LINEAR
from kithara_ray.hf.lora_config import is_named
from kithara_ray.hf.resizing.tables import described, rows_of
from kithara_ray.hf.tower import TOWER, in_tower, is_in_tower, prefix_of, wrapper_of
from kithara_ray.hf.unused import why_unused
from kithara_ray.model.lora.conversion import check_parameters, converted

_WEIGHT = ".weight"
_EMBEDDINGS = ("embed_tokens", "embed_tokens_per_layer", "lm_head")
_EXPERTS = ".experts."


def linear_modules_of(base: BaseCheckpoint) -> list[str]:
    """List the text model's modules with a matrix that are linear layers in transformers, except the head."""
    matrices = (name for name, info in base.tensors.items() if name.endswith(_WEIGHT) and len(info.shape) == 2)
    used = (n for n in matrices if is_in_tower(base.config, n) and why_unused(base.config, n) is None)
    return sorted(linear((name.removesuffix(_WEIGHT) for name in used), base.config))


def linear(modules: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Select, from a checkpoint's modules with a matrix, the linear layers in transformers, except the head.

    The experts and the router of a mixture are not selected: they are parameters; see `conversion`. Where PEFT takes an
    expert's name ("up_proj") for its parameter, a layer of that name is not selected either.

    Args:
        config: config.json.
    """
    modules = list(modules)
    apart = {*_EMBEDDINGS, *former_names(config)}
    return [module for module in modules if not (_leaf(module) in apart or _EXPERTS in module or is_router(module))]


def other_modules_of(base: BaseCheckpoint) -> list[str]:
    """List modules that PEFT considers but that are not linear layers of the text model.

    They are embedding, head, norms, blocks and their parts, and all modules beside the text model.

    A target that matches one of them is an error in PEFT, or an adapter that this library does not have.
    """
    linear = set(linear_modules_of(base))
    names = base.tensors
    if not former_names(base.config):
        # An expert is no module, but a part of a parameter.
        names = [name for name in names if _EXPERTS not in name]
    modules = {name.rpartition(".")[0] for name in names}
    parents = {module[: match.start()] for module in modules for match in re.finditer(r"\.", module)}
    # A tied head is a module without a tensor; activations and rotary embeddings never have one.
    activations = {f"{module}.act_fn" for module in parents if module.endswith(".mlp")}
    rotary = {"lm_head", in_tower(base.config, "model.rotary_emb")}
    return sorted((modules | parents | activations | rotary) - linear)


def targets_of(given: str | Iterable[str], base: BaseCheckpoint) -> tuple[str, ...] | str:
    """Convert a user's `target_modules` to LoraConfig's form: "all-linear" and one name become lists of names."""
    if not isinstance(given, str):
        return tuple(given)
    if given.lower() == ALL_LINEAR:
        return all_linear(linear_modules_of(base), base.config)
    return (given,) if re.fullmatch(r"[\w.]+", given) else given


def all_linear(modules: Iterable[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Spell "all-linear" out: the names of these linear modules, and former names of parameters as in PEFT."""
    return tuple(sorted({_leaf(module) for module in modules} | former_names(config).keys()))


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
    lora = converted(LoraConfig(r=rank, target_modules=targets, **patterns, **settings), base.config)
    check_parameters(lora, base)
    lora = of_text_model(lora, base.config)
    if lora.is_resized and rows_of(base) == lora.resize_token_embeddings:
        lora = dataclasses.replace(lora, resize_token_embeddings=None)
    base = described(base, lora)
    lora = dataclasses.replace(lora, **beside.normal(lora, base))
    if lora.bias != "none" and not any(one.tensor.endswith(beside.BIAS) for one in beside.of_base(lora, base)):
        raise ConfigError(f"bias={lora.bias!r}: none of these layers has a bias in this base; leave it out")
    linear_modules, others = linear_modules_of(base), other_modules_of(base)
    check_selection(lora, linear_modules, others)
    check_targets(lora, linear_modules, others)
    return lora


def of_text_model(config: LoraConfig, model_config: Mapping[str, Any]) -> LoraConfig:
    """Restrict the targets to the text model of a multimodal checkpoint; a text model's config stays as it is.

    PEFT applies adapter_config.json to the whole model, where "q_proj" names layers of the vision tower too. A list of
    names becomes a regular expression. If `layers_to_transform` counts blocks, for which PEFT wants a list, the other
    parts are excluded instead.
    """
    tower = prefix_of(model_config)
    if wrapper_of(model_config) is None:
        return config
    within = re.escape(tower.removesuffix("."))
    targets = config.target_modules
    if not targets:
        return config
    if isinstance(targets, str):
        already = targets.startswith((tower, within, f"(?={within}"))
        return config if already else dataclasses.replace(config, target_modules=rf"(?={within}\.)(?:{targets})")
    if config.layers_to_transform is None:
        names = "|".join(sorted({re.escape(_within(tower, name)) for name in targets}))
        # vLLM looks for the names in the group at the end.
        wanted = rf"{within}\b.*\.({names})"
        return dataclasses.replace(config, target_modules=wanted)
    excluded = config.exclude_modules or ()
    if not isinstance(excluded, str):
        excluded = "|".join(rf"(?:.*\.)?{re.escape(name)}" for name in excluded)
    outside = rf"(?!{within}\.).*"
    return dataclasses.replace(config, exclude_modules=f"{outside}|{excluded}" if excluded else outside)


def _within(tower: str, target: str) -> str:
    """The part of a target's name behind the tower's."""
    parts = tower.removesuffix(".").split(".")
    starts = (".".join(parts[at:]) + "." for at in range(len(parts)))
    return next((target.removeprefix(start) for start in starts if target.startswith(start)), target)


def check_targets(config: LoraConfig, modules: Sequence[str], others: Sequence[str] = ()) -> None:
    """Check that every target matches a linear module and none of the `others`, and that some modules are selected.

    Raises:
        ConfigError: names the entry and the available modules.
    """
    targets = config.target_modules
    if not targets:
        return
    for target in [targets] if isinstance(targets, str) else targets:
        entry = targets if isinstance(targets, str) else (target,)
        one = dataclasses.replace(config, target_modules=entry, target_parameters=())
        wrong = next((module for module in others if one.matches(module)), None)
        if wrong is not None:
            what = "an embedding" if _leaf(wrong) in _EMBEDDINGS else "no linear layer"
            if modules and modules[0].startswith(TOWER) and not wrong.startswith(TOWER):
                what = "beside the text model, which alone is trained"
            elif _EXPERTS in f"{wrong}." or is_router(wrong):
                what = "of a mixture of experts, which transformers holds as parameters: give target_parameters"
            raise ConfigError(f"target_modules: {target!r} matches {wrong}, {what}; LoRA adapts only linear layers")
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
            f"{', '.join(given)}: no module is left of target_modules={targets!r}; select less, or leave out"
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
    layers = {layer for module in modules if (layer := config.layer_of(module)) is not None}
    unknown = sorted(set(config.layers_to_transform or ()) - layers)
    if unknown:
        there = f"layers {min(layers)} to {max(layers)}" if layers else "no layer with such a name"
        pattern = f" with layers_pattern={list(config.layers_pattern)}" if config.layers_pattern else ""
        raise ConfigError(f"layers_to_transform: no layer {unknown[0]}{pattern}; this model has {there}")


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
