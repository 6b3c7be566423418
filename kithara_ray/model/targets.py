"""Which modules of a checkpoint LoRA can adapt, from its files alone: no jax, no keras, so the driver can ask early."""

from collections.abc import Iterable

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint

_WEIGHT = ".weight"
_EMBEDDINGS = ("embed_tokens", "lm_head")  # of tokens and, tied or not, of predictions
_ROUTERS = ("gate", "router")
_EXPERTS = ".experts."


def modules_of(base: BaseCheckpoint) -> list[str]:
    """Modules with a matrix."""
    matrices = (name for name, info in base.tensors.items() if name.endswith(_WEIGHT) and len(info.shape) == 2)
    return sorted(name.removesuffix(_WEIGHT) for name in matrices)


def linear(modules: Iterable[str]) -> list[str]:
    """Those of a checkpoint's modules with a matrix that are linear layers in transformers, embeddings and head apart.

    The experts and the router of a mixture are not: transformers holds all experts in one parameter, and PEFT takes a
    name that an expert has ("up_proj") for that parameter, also where a layer has it too.
    """
    modules = list(modules)
    apart = {_leaf(module) for module in modules if _EXPERTS in module}
    apart.update(_EMBEDDINGS, _ROUTERS)
    return [module for module in modules if _leaf(module) not in apart]


def check_targets(config: LoraConfig, modules: Iterable[str]) -> None:
    """Every entry of `target_modules` matches linear layers among these modules, and nothing else.

    Raises:
        ConfigError: an entry matches nothing; names it and what there is.
        UnsupportedError: an entry matches experts or a router.
    """
    modules = list(modules)
    layers = linear(modules)
    leaves = ", ".join(sorted({_leaf(module) for module in layers}))
    for target in config.target_modules:
        matched = [module for module in modules if module == target or module.endswith("." + target)]
        apart = [module for module in matched if module not in layers and _leaf(module) not in _EMBEDDINGS]
        if apart:
            raise UnsupportedError(
                f"target_modules: {target!r} matches {apart[0]}, of a mixture of experts; transformers holds experts "
                f"and routers as parameters, and LoRA on these is not supported: adapt {leaves}"
            )
        if not any(module in layers for module in matched):
            raise ConfigError(f"target_modules: {target!r} matches no linear layer of this model; it has {leaves}")


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
