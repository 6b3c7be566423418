"""LoRA fine-tuning of open LLMs on Cloud TPU pods with Ray, KerasHub and JAX.

Each name below is loaded on first use. Importing this package imports no jax, keras, ray or torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kithara_ray.callbacks import Callback, Profiler
    from kithara_ray.checkpoint.checkpointer import Checkpointer
    from kithara_ray.orchestration.data.datasets import Dataloader, SFTDataset, TextCompletionDataset, mix
    from kithara_ray.orchestration.model import KerasHubModel
    from kithara_ray.orchestration.results import TrainResult
    from kithara_ray.orchestration.trainer import Trainer
    from kithara_ray.sharding.shape import MeshShape

_HOMES = {
    "Callback": "kithara_ray.callbacks",
    "Checkpointer": "kithara_ray.checkpoint.checkpointer",
    "Dataloader": "kithara_ray.orchestration.data.datasets",
    "KerasHubModel": "kithara_ray.orchestration.model",
    "MeshShape": "kithara_ray.sharding.shape",
    "Profiler": "kithara_ray.callbacks",
    "SFTDataset": "kithara_ray.orchestration.data.datasets",
    "TextCompletionDataset": "kithara_ray.orchestration.data.datasets",
    "TrainResult": "kithara_ray.orchestration.results",
    "Trainer": "kithara_ray.orchestration.trainer",
    "mix": "kithara_ray.orchestration.data.datasets",
}

__all__ = [
    "Callback",
    "Checkpointer",
    "Dataloader",
    "KerasHubModel",
    "MeshShape",
    "Profiler",
    "SFTDataset",
    "TextCompletionDataset",
    "TrainResult",
    "Trainer",
    "mix",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "tune":
        return importlib.import_module("kithara_ray.tune")
    if name not in _HOMES:
        raise AttributeError(f"module 'kithara_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *__all__])
