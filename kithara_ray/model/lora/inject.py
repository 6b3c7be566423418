"""LoRA's factors added to a built backbone."""

from collections.abc import Collection, Mapping, Sequence

import keras

from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.blocks.stack import find_chain
from kithara_ray.model.families.ports import Port
from kithara_ray.model.identity import IdentityMap
from kithara_ray.model.lora.layers import Place, Target, linear_modules, matrices_of, place_of
from kithara_ray.model.lora.parameters import parameter_places
from kithara_ray.model.lora.targets import check_targets


def inject(
    backbone, ports: Sequence[Port], config: LoraConfig, hf_config: Mapping, alike: bool = False
) -> list[Target]:
    """Adapt every linear layer, and every parameter of a mixture, that `config` targets.

    Args:
        hf_config: the base's config.json.
        alike: give blocks without a target the same side paths, with zero factors, so that one scan still covers all
            blocks.

    Raises:
        ConfigError: a target module matches nothing.
        UnsupportedError: a matched layer has an activation or is not a linear map.
    """
    layers = linear_modules(backbone, ports, hf_config)
    if config.target_modules:
        check_targets(config, list(layers))
    places = {module: place_of(layer) for module, layer in layers.items()}
    if config.target_parameters:
        places |= parameter_places(backbone, ports, matrices_of(backbone, ports))
    like = {module: module for module in places if config.matches(module)}
    if alike and not config.use_dora:  # with DoRA, a zero magnitude would change the layer
        like |= _counterparts(backbone, places, like.keys(), config)
    return [place.adapt(module, like[module], config) for module, place in places.items() if module in like]


def _counterparts(
    backbone, places: Mapping[str, Place], targets: Collection[str], config: LoraConfig
) -> dict[str, str]:
    """Map modules that are not targets to a target at the same place in another block of the same kind.

    Places whose targets differ in rank or scale are left out: their blocks differ anyway.
    """
    module_of: IdentityMap[keras.Variable, str] = IdentityMap((p.kernel, module) for module, p in places.items())
    found: dict[str, str] = {}
    periods = ((section, at) for section in find_chain(backbone).sections for at in range(section.period))
    for section, at in periods:
        for group in zip(*(block.variables for block in section.blocks[at :: section.period]), strict=True):
            modules = [module_of[variable] for variable in group if variable in module_of]
            adapted = [module for module in modules if module in targets]
            if len({(config.rank_of(module), config.scale_of(module)) for module in adapted}) == 1:
                found |= {module: adapted[0] for module in modules if module not in targets}
    return found
