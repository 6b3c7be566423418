"""A merged model computes what the base with its adapter computes: what no comparison of files can show.

B  rows, 1    T  positions    V  vocabulary
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from kithara_ray.errors import ExportError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.causal_lm import build
from kithara_ray.sharding.mesh import batch_sharding, make_mesh

TOKENS = 32
# Of the logits' norm, by the dtype of the merged weights: each of them was rounded once.
_TOLERANCES = {"F32": 1e-4, "F16": 1e-2, "BF16": 5e-2}


def prove_logits(base: BaseCheckpoint, lora: LoraConfig, tensors: Mapping[str, np.ndarray], merged: Path) -> str:
    """Compute all three in float32 on this process' devices, and say how far apart their logits are.

    Args:
        tensors: the adapter's, by PEFT's names.
        merged: a local directory.

    Raises:
        ExportError: the merged model's logits differ by more than the rounding of its weights explains.
    """
    written = BaseCheckpoint.open(merged)
    adapted_BTV = _logits_BTV(base, lora, tensors)
    scale = np.linalg.norm(adapted_BTV)
    off = np.linalg.norm(_logits_BTV(written) - adapted_BTV) / scale
    effect = np.linalg.norm(_logits_BTV(base) - adapted_BTV) / scale
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


def _logits_BTV(base: BaseCheckpoint, lora: LoraConfig | None = None, tensors: Mapping | None = None) -> np.ndarray:
    mesh = make_mesh()
    model = build(base.config, lora, mesh, "float32")
    factors = {} if lora is None else model.place_factors(tensors)
    ids = np.random.default_rng(0).integers(0, base.config["vocab_size"], (mesh.size, TOKENS)).astype(np.int32)
    ids[:] = ids[0]
    place = lambda array: jax.device_put(array, batch_sharding(mesh))  # noqa: E731
    logits = jax.jit(model.logits_BTV)(factors, model.load(base), place(ids), place(np.ones_like(ids)))
    return np.asarray(logits)[:1].astype(np.float64)
