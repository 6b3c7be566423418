"""Tensors that an adapter holds besides its factors: biases, and the embedding and the head, whole or by row.

PEFT trains weights of the base itself if a config says so. It saves their values, not differences:

    bias                      <module>.bias, or <module>.base_layer.bias for an adapted module
    trainable_token_indices   <module>.token_adapter.trainable_tokens_delta, the rows (K, D) of K tokens
    modules_to_save           <module>.weight

If the head is tied to the embedding, PEFT trains tokens in both. `ensure_weight_tying` asks for this for the whole
module.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kithara_ray.errors import AdapterError, ConfigError, UnsupportedError
from kithara_ray.hf import tied_head
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_checks import EMBEDDING, HEAD
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.tower import is_in_tower

BIAS = ".bias"
BASE_BIAS = ".base_layer.bias"
TOKENS = ".token_adapter.trainable_tokens_delta"
WEIGHT = ".weight"


@dataclass(frozen=True)
class Beside:
    """One tensor that an adapter has besides its factors.

    Attributes:
        name: its name in the adapter.
        tensor: the base's tensor for which it holds values.
        rows: the rows of that tensor for which it holds values; None means all.
    """

    name: str
    tensor: str
    rows: tuple[int, ...] | None = None


def tensor_of(name: str) -> str:
    """Return the base's tensor for which a tensor of the adapter, other than a factor, holds values."""
    if name.endswith(TOKENS):
        return name.removesuffix(TOKENS) + WEIGHT
    return name.removesuffix(BASE_BIAS) + BIAS if name.endswith(BASE_BIAS) else name


def rows_of(config: LoraConfig, name: str) -> tuple[int, ...] | None:
    """Return the rows of the base's tensor that the adapter's tensor gives; None means all."""
    module = name.removesuffix(TOKENS)
    return config.trainable_token_indices[module.rpartition(".")[2]] if module != name else None


def bias_name(config: LoraConfig, bias: str) -> str | None:
    """Return the adapter's name for a bias of the base, `<module>.bias`; None if the bias is not trained."""
    module = bias.removesuffix(BIAS)
    if config.bias == "none" or (not (is_target := config.matches(module)) and config.bias != "all"):
        return None
    return module + BASE_BIAS if is_target else bias


def tables_of(config: LoraConfig, modules: Iterable[str]) -> list[Beside]:
    """List the adapter's tensors for the embedding and the head.

    Args:
        modules: their names: `model.embed_tokens`, and `lm_head` if it has a weight of its own.
    """
    made = []
    for module in modules:
        leaf = module.rpartition(".")[2]
        if leaf in config.modules_to_save:
            made.append(Beside(module + WEIGHT, module + WEIGHT))
        elif leaf in config.trainable_token_indices:
            made.append(Beside(module + TOKENS, module + WEIGHT, config.trainable_token_indices[leaf]))
    return made


def of_base(config: LoraConfig, base: BaseCheckpoint) -> list[Beside]:
    """List all tensors that an adapter of this config has besides its factors."""
    biases = [(bias_name(config, name), name) for name in base.names if name.endswith(BIAS)]
    _refuse_biases_beside(config, base, [name for trained, name in biases if trained is not None])
    tables = (n.removesuffix(WEIGHT) for n in base.names if n.endswith((f"{EMBEDDING}{WEIGHT}", f"{HEAD}{WEIGHT}")))
    tied = is_tied(base)
    tables = [name for name in tables if not (tied and name.endswith(HEAD))]
    return [Beside(name, bias) for name, bias in biases if name is not None] + tables_of(config, tables)


def _refuse_biases_beside(config: LoraConfig, base: BaseCheckpoint, trained: Iterable[str]) -> None:
    outside = [name for name in trained if not is_in_tower(base.config, name)]
    if outside:
        raise UnsupportedError(
            f"bias={config.bias!r} would train {outside[0]}, which is beside the text model; only the text model of a "
            'multimodal checkpoint is trained. Give bias="lora_only" or "none"'
        )


def is_tied(base: BaseCheckpoint) -> bool:
    """True if the head is the embedding."""
    return tied_head.is_tied(base.config) or f"{HEAD}{WEIGHT}" not in base.names


def normal(config: LoraConfig, base: BaseCheckpoint) -> dict[str, Any]:
    """Return the config fields that weight tying changes, as PEFT interprets them for this base.

    Raises:
        UnsupportedError, ConfigError: PEFT would train the head and the embedding of a tied model separately, or the
            base lacks what the config names.
    """
    tokens, saved = dict(config.trainable_token_indices), set(config.modules_to_save)
    vocabulary = next((i.shape[0] for n, i in base.tensors.items() if n.endswith(f"{EMBEDDING}{WEIGHT}")), None)
    if vocabulary is None and (tokens or saved):
        raise UnsupportedError(
            f"modules_to_save, trainable_token_indices: {base.directory} has no {EMBEDDING}{WEIGHT}; leave them out"
        )
    for name, rows in tokens.items():
        beyond = [row for row in rows if vocabulary is not None and row >= vocabulary]
        if beyond:
            raise ConfigError(
                f"trainable_token_indices: token {beyond[0]} of {name!r} is beyond the base's {vocabulary} rows. "
                "Add rows with resize_token_embeddings=len(tokenizer)"
            )
    if not is_tied(base):
        if config.ensure_weight_tying:
            raise ConfigError("ensure_weight_tying: this base does not tie its head to its embedding; leave it out")
        return {}
    if HEAD in tokens and tokens.get(EMBEDDING) != tokens[HEAD]:
        raise UnsupportedError(
            f"trainable_token_indices: this base ties its head to its embedding, but {HEAD!r} lists other tokens than "
            f"{EMBEDDING!r}; give one list for both"
        )
    if saved and not config.ensure_weight_tying:
        raise UnsupportedError(
            "modules_to_save: this base ties its head to its embedding, and PEFT would train the two separately; give "
            "ensure_weight_tying=True to train them as one, or trainable_token_indices"
        )
    if saved and tokens:
        raise ConfigError("modules_to_save trains the whole embedding; leave trainable_token_indices out")
    tokens.pop(HEAD, None)
    return {"trainable_token_indices": tokens, "modules_to_save": (EMBEDDING,) if saved else ()}


def check_names(config: LoraConfig, names: Iterable[str]) -> None:
    """Refuse a tensor that the adapter's config does not name. Raises AdapterError."""
    for name in names:
        leaf = name.removesuffix(TOKENS).removesuffix(WEIGHT).rpartition(".")[2]
        if name.endswith(TOKENS):
            field, is_on = "trainable_token_indices", leaf in config.trainable_token_indices
        elif name.endswith(BIAS):
            field, is_on = "bias", config.bias != "none"
        else:
            field, is_on = "modules_to_save", name.endswith(WEIGHT) and leaf in config.modules_to_save
        if not is_on:
            raise AdapterError(
                f"{name}: adapter_config.json says {field}={getattr(config, field)!r}, which does not name it"
            )


def without_copies(config: LoraConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a file's tensors without the head, which PEFT writes as a copy of the embedding.

    Raises:
        AdapterError: the head is not a copy of the embedding.
    """
    kept, head = dict(tensors), f"{HEAD}{WEIGHT}"
    if not copies_head(config) or head not in kept:
        return kept
    embedding = next((array for name, array in kept.items() if name.endswith(f"{EMBEDDING}{WEIGHT}")), None)
    if embedding is None or not np.array_equal(embedding, kept.pop(head)):
        raise AdapterError(f"{head}: ensure_weight_tying ties it to the embedding, but their values differ")
    return kept


def without_tied_tokens(base: BaseCheckpoint, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return an adapter's tensors without the tokens of a tied head, which PEFT may write as copies.

    Raises:
        AdapterError: the head's tokens are not a copy of the embedding's.
    """
    kept, head = dict(tensors), f"{HEAD}{TOKENS}"
    embedding = next((array for name, array in kept.items() if name.endswith(f"{EMBEDDING}{TOKENS}")), None)
    if head not in kept or embedding is None or not is_tied(base):
        return kept
    if not np.array_equal(embedding, kept.pop(head)):
        raise AdapterError(f"{head}: the base ties its head to its embedding, but their trained tokens differ")
    return kept


def with_copies(config: LoraConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the head that `without_copies` removes."""
    if not copies_head(config):
        return dict(tensors)
    embedding = next(array for name, array in tensors.items() if name.endswith(f"{EMBEDDING}{WEIGHT}"))
    return {**tensors, f"{HEAD}{WEIGHT}": embedding}


def copies_head(config: LoraConfig) -> bool:
    return config.ensure_weight_tying and config.modules_to_save == (EMBEDDING,)
