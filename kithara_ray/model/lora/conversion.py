"""Targets of a mixture's experts and router, from a checkpoint's files only: no jax, no keras.

transformers 5 holds a mixture's experts and its router as parameters. PEFT adapts them by `target_parameters`, and for
the model types of `experts.CONVERTED` takes the former names of layers in `target_modules` for them. Gate and up
projection are one parameter then, adapted with twice the rank at the same scale.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from kithara_ray.errors import ConfigError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.experts import GATE_UP, former_names, module_of, parameters_of, part_of
from kithara_ray.hf.lora_config import LoraConfig, is_named


def converted(lora: LoraConfig, config: Mapping[str, Any]) -> LoraConfig:
    """Replace former names in a list of target_modules by target_parameters, as PEFT does.

    Args:
        config: config.json.

    Raises:
        ConfigError: only one of gate and up projection is named, or a name is dotted: PEFT would adapt all layers.
    """
    names = former_names(config)
    if not names or isinstance(lora.target_modules, str):
        return lora
    former = [target for target in lora.target_modules if target.rpartition(".")[2] in names]
    if not former:
        return lora
    if dotted := [target for target in former if "." in target]:
        leaf = dotted[0].rpartition(".")[2]
        raise ConfigError(
            f"target_modules: PEFT takes {dotted[0]!r} for {names[leaf]!r} of all layers of this mixture; give "
            f"{leaf!r}, or the whole name in target_parameters"
        )
    fused = [name for name, parameter in names.items() if parameter == GATE_UP]
    given = [name for name in fused if name in former]
    if len(given) == 1:
        (missing,) = set(fused) - set(given)
        raise ConfigError(
            f"target_modules: {given[0]!r} needs {missing!r} beside it: transformers holds both in {GATE_UP}, which is "
            "adapted as a whole"
        )
    doubled = {rf".*\.{GATE_UP}": 2} if given else {}
    return dataclasses.replace(
        lora,
        target_modules=tuple(target for target in lora.target_modules if target not in former),
        target_parameters=tuple(sorted({*lora.target_parameters, *(names[target] for target in former)})),
        rank_pattern=lora.rank_pattern | {key: times * lora.r for key, times in doubled.items()},
        alpha_pattern=lora.alpha_pattern | {key: times * lora.alpha for key, times in doubled.items()},
    )


def check_parameters(lora: LoraConfig, base: BaseCheckpoint) -> None:
    """Check that every entry of target_parameters names parameters of a mixture, and nothing else.

    Raises:
        ConfigError: names the entry and the parameters that the model has.
    """
    if not lora.target_parameters:
        return
    known = parameters_of(base)
    endings = sorted({_ending(name) for name in known})
    have = (
        f"this model has {', '.join(endings)}" if known else "this model is no mixture of experts; give target_modules"
    )
    others = [module_of(name) + ".weight" for name in base.names if part_of(name) is None and name.endswith(".weight")]
    for entry in lora.target_parameters:
        if not any(is_named((entry,), name) for name in known):
            raise ConfigError(f"target_parameters: {entry!r} matches no parameter of experts or their router; {have}")
        wrong = next((name for name in others if name not in known and is_named((entry,), name)), None)
        if wrong is not None:
            raise ConfigError(
                f"target_parameters: {entry!r} matches {wrong} too, which is of no mixture; give a longer name; {have}"
            )
    if lora.layers_to_transform is not None:
        raise ConfigError(
            "layers_to_transform selects no parameters, in PEFT neither: the target_parameters of all layers would be "
            f"adapted. Give them with their layers' numbers, as in 'layers.{lora.layers_to_transform[0]}."
            f"{endings[0]}', or leave layers_to_transform out"
        )


def _ending(parameter: str) -> str:
    """The name of a parameter behind its layer's number."""
    return re.sub(r"^.*\.layers\.\d+\.", "", parameter)
