"""Where LoRA's factors of a mixture's parameters are in the built model.

The factors of experts belong to the layer that holds the kernels; `blocks.experts` computes with them. A router that is
a linear layer is adapted like any other. A router of `DecoderExperts` has factors on that layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from kithara_ray.hf.facts.experts import DOWN, GATE_UP, Parameter, holder_of, is_router, module_of, part_of
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.blocks.mixtures import Bank, add_factors, banks_of
from kithara_ray.model.decoder.mlp import DecoderExperts
from kithara_ray.model.families.ports import Port
from kithara_ray.model.identity import IdentityMap
from kithara_ray.model.lora.layers import Place, Target, initialiser_of, place_of

_PRODUCTS = {GATE_UP: "wide", DOWN: "down"}


def parameter_places(backbone, ports: Sequence[Port], linear: Mapping[str, keras.layers.Layer]) -> dict[str, Place]:
    """Map each parameter of the model's mixtures to the place of its factors; a router by its module's name.

    Args:
        linear: the Keras layers with a matrix, by the name of its tensor.
    """
    name_of = IdentityMap((port.variable, port.hf_name) for port in ports)
    places: dict[str, Place] = {}
    for bank in banks_of([backbone]):
        for kernel in (bank.kernels[-1], bank.kernels[0]):
            part = part_of(name_of[kernel])
            assert part is not None  # a tensor of experts feeds each of them
            places[part.parameter] = _of_experts(bank, kernel, holder_of(part.parameter)[1])
        if isinstance(bank.mixture, DecoderExperts):
            places[module_of(name_of[bank.mixture.router])] = _of_own_router(bank.mixture)
    routers = {module_of(name): layer for name, layer in linear.items()}
    return places | {module: place_of(layer) for module, layer in routers.items() if is_router(module)}


def _of_experts(bank: Bank, kernel: keras.Variable, leaf: str) -> Place:
    _, into, out = kernel.shape
    if leaf == GATE_UP and len(bank.kernels) > 2:
        out *= 2
    shape = Parameter(bank.count, out, into)

    def adapt(module: str, like: str, config: LoraConfig) -> Target:
        rank = config.rank_of(like)
        a, b = add_factors(bank.layer, _PRODUCTS[leaf], shape.factors(rank), config.scale_of(like))
        return Target(module, bank.layer, initialiser_of(config), a, b, None, None, module == like, rank, by_step=True)

    return Place(kernel, adapt)


def _of_own_router(mixture: Any) -> Place:
    def adapt(module: str, like: str, config: LoraConfig) -> Target:
        rank = config.rank_of(like)
        a, b = mixture.add_router_factors(rank, config.scale_of(like))
        return Target(module, mixture, initialiser_of(config), a, b, None, None, module == like, rank)

    return Place(mixture.router, adapt)
