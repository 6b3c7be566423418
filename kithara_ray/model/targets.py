"""Which modules of a checkpoint LoRA can adapt, from its files alone: no jax, no keras, so the driver can ask early."""

from collections.abc import Sequence

from kithara_ray.errors import ConfigError
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint

_WEIGHT = ".weight"
_EMBEDDINGS = ("embed_tokens", "lm_head")


def linear_modules_of(base: BaseCheckpoint) -> list[str]:
    """Modules with a matrix that are not an embedding."""
    matrices = (name for name, info in base.tensors.items() if name.endswith(_WEIGHT) and len(info.shape) == 2)
    modules = (name.removesuffix(_WEIGHT) for name in matrices)
    return sorted(module for module in modules if module.rpartition(".")[2] not in _EMBEDDINGS)


def check_targets(config: LoraConfig, modules: Sequence[str]) -> None:
    """Every entry of `target_modules` matches a linear module.

    Raises:
        ConfigError: names the entry and what there is.
    """
    for target in config.target_modules:
        if not any(module == target or module.endswith("." + target) for module in modules):
            leaves = sorted({module.rpartition(".")[2] for module in modules})
            raise ConfigError(
                f"target_modules: {target!r} matches no linear layer of this model; it has {', '.join(leaves)}"
            )
