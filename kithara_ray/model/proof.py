"""Proof that a merged model computes the same as the base with its adapter, which no comparison of files can give.

B  rows, 1    T  positions    V  vocabulary
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from kithara_ray.errors import ExportError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.resizing.tables import resized
from kithara_ray.hf.tower import text_of
from kithara_ray.model.causal_lm import CausalLM, Frozen, Params, build
from kithara_ray.sharding.mesh import batch_sharding, make_mesh

TOKENS = 32
# Allowed difference relative to the logits' norm, by the dtype of the merged weights: each weight was rounded once.
_TOLERANCES = {"F32": 1e-4, "F16": 1e-2, "BF16": 5e-2}


def prove_logits(base: BaseCheckpoint, lora: LoraConfig, tensors: Mapping[str, np.ndarray], merged: Path) -> str:
    """Compare logits of the base, the base with the adapter, and the merged model, and report how far apart they are.

    All three are computed in float32 on this process' devices.

    Args:
        tensors: the adapter's tensors, by PEFT's names.
        merged: a local directory.

    Raises:
        ExportError: the merged model's logits differ by more than the rounding of its weights explains.
    """
    written, base = BaseCheckpoint.open(merged), resized(base, lora)
    model = build(base.config, lora, make_mesh(), "float32")
    # PEFT's initial factors change nothing: B is zero, and DoRA's magnitudes are the weights' own.
    first = lambda frozen: model.initial_factors(0, frozen)  # noqa: E731
    adapted_BTV, plain_BTV = _logits_BTV(model, base, lambda frozen: model.place_factors(tensors), first)
    (merged_BTV,) = _logits_BTV(build(written.config, None, make_mesh(), "float32"), written, lambda frozen: {})
    scale = np.linalg.norm(adapted_BTV)
    off = np.linalg.norm(merged_BTV - adapted_BTV) / scale
    effect = np.linalg.norm(plain_BTV - adapted_BTV) / scale
    allowed = max(_TOLERANCES.get(info.dtype, 0.0) for info in written.tensors.values())
    if not off <= allowed:
        raise ExportError(
            f"{merged}: on {TOKENS} tokens the merged model's logits differ by {off:.2g} of their norm from those of "
            f"the base with its adapter, {allowed:.2g} is what rounding explains; the base's own differ by {effect:.2g}"
        )
    return (
        f"logits of {TOKENS} tokens: the merged model's differ by {off:.1e} of their norm from those of the base with "
        f"its adapter, the base's own by {effect:.1e}"
    )


def _logits_BTV(model: CausalLM, checkpoint: BaseCheckpoint, *factors: Callable[[Frozen], Params]) -> list[np.ndarray]:
    """Compute float64 logits of the same tokens with each set of factors. The loaded weights make each set."""
    ids = np.random.default_rng(0).integers(0, text_of(checkpoint.config)["vocab_size"], (1, TOKENS)).astype(np.int32)
    # One row per device, all equal.
    ids = np.repeat(ids, model.mesh.size, axis=0)
    tokens, segments = (jax.device_put(array, batch_sharding(model.mesh)) for array in (ids, np.ones_like(ids)))
    frozen, compute = model.load(checkpoint), jax.jit(model.logits_BTV)
    logits = (compute(make(frozen), frozen, tokens, segments) for make in factors)
    return [np.asarray(rows)[:1].astype(np.float64) for rows in logits]
