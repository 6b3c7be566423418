"""Callbacks to which a run reports its progress: the protocol, trackers, a profiler. No Ray, no JAX on import."""

from kithara_ray.callbacks.callback import Callback, RunInfo
from kithara_ray.callbacks.profiler import Profiler
from kithara_ray.callbacks.tensorboard import TensorBoard
from kithara_ray.callbacks.trackers import MLflow, WandB

__all__ = ["Callback", "MLflow", "Profiler", "RunInfo", "TensorBoard", "WandB"]
