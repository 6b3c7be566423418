"""Combine several adapters of one base into one: the exact weighted sum of their updates.

    delta = sum over i of weight_i * scale_i * B_i @ A_i = concat(B_i) @ concat(weight_i * scale_i * A_i)

Nothing is approximated: ranks add up, and the scale of the result is 1. This is peft's `add_weighted_adapter(...,
combination_type="cat")`. Factors are multiplied in peft's order, so merges agree bit by bit.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf.adapter import A_SUFFIX, B_SUFFIX, Adapter
from kithara_ray.hf.fetch import fetch
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.storage.urls import is_url


def read_weighted(text: str) -> tuple[Adapter, float]:
    """Read `ADAPTER` or `ADAPTER:WEIGHT`. The adapter is a directory or URL; the weight is 1 by default."""
    handle, weight = split_weight(text)
    return Adapter.read(fetch(handle)), weight


def split_weight(text: str) -> tuple[str, float]:
    """Split `ADAPTER[:WEIGHT]` into (directory or URL, weight).

    If the whole text names a directory that exists, it is the adapter, even with a colon in its name.
    """
    if not is_url(text) and Path(text).expanduser().is_dir():
        return text, 1.0
    handle, _, number = text.rpartition(":")
    try:
        return (handle, float(number)) if handle else (text, 1.0)
    except ValueError:  # no weight: the colon belongs to a URL or a name
        return text, 1.0


def combine(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Return one float32 adapter. A module that only some adapters have gets the sum of theirs.

    Raises: ConfigError for a weight that is not finite, UnsupportedError for DoRA, whose update is not a product.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ConfigError(f"combine needs a weight for each adapter, got {len(adapters)} and {len(weights)}")
    for adapter, weight in zip(adapters, weights, strict=True):
        if not np.isfinite(weight):
            raise ConfigError(f"an adapter's weight must be finite, got {weight!r}")
        if adapter.config.use_dora:
            raise UnsupportedError(
                "DoRA adapters cannot be combined, because their update is not a sum of products; merge each one "
                "separately"
            )
        if adapter.config.target_parameters:
            raise UnsupportedError(
                "adapters with target_parameters cannot be combined, in PEFT neither; merge each one separately"
            )
        if adapter.config.has_beside or adapter.config.lora_bias or adapter.tables:
            raise UnsupportedError(
                "adapters with biases, trained tokens, saved modules or added tokens cannot be combined, because those "
                "are values and not updates; merge each adapter separately"
            )
    tensors, ranks = {}, {}
    for module in sorted({module for adapter in adapters for module in adapter.modules}):
        parts = [(a, w) for a, w in zip(adapters, weights, strict=True) if module in a.modules]
        a_RI = [
            adapter.a(module).astype(np.float32) * np.float32(weight) * np.float32(adapter.config.scale_of(module))
            for adapter, weight in parts
        ]
        b_OR = [adapter.b(module).astype(np.float32) for adapter, _ in parts]
        tensors[module + A_SUFFIX], tensors[module + B_SUFFIX] = np.concatenate(a_RI), np.concatenate(b_OR, axis=1)
        ranks[module] = len(tensors[module + A_SUFFIX])
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(module): found for module, found in ranks.items() if found != rank}
    targets = sorted({target for adapter in adapters for target in _targets_of(adapter)})
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=tuple(targets), rank_pattern=others, alpha_pattern=dict(others)
    )
    return Adapter(config, tensors)


def _targets_of(adapter: Adapter) -> tuple[str, ...]:
    """Return the adapter's entries of target_modules.

    A regular expression or a selection of layers becomes a list of modules, since one config cannot hold two of them.
    """
    targets = adapter.config.target_modules
    return adapter.modules if isinstance(targets, str) or adapter.config.selects_layers else targets
