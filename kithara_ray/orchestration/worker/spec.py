"""What the driver has decided about a run: plain data that is carried to every worker's process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kithara_ray.callbacks import Callback, Profiler
from kithara_ray.checkpoint.checkpointer import Checkpointer
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.orchestration.data.data_spec import DataSpec
from kithara_ray.orchestration.request.run_request import StepSettings
from kithara_ray.orchestration.request.snapshots import Snapshots
from kithara_ray.orchestration.worker.channel import Channel
from kithara_ray.orchestration.worker.heartbeat import Limits


@dataclass(frozen=True)
class ModelSpec:
    """What is trained, and from where on.

    Attributes:
        base: handle or directory of the base checkpoint, or of weights that were trained before.
        lora: what is adapted; None trains all weights.
        precision: Keras dtype policy.
        quantize: what the frozen kernels are held as: "int8", or None as in the base.
        adapter: tensors by name to go on from; None starts from PEFT's initial factors.
    """

    base: str
    lora: LoraConfig | None
    precision: str
    quantize: str | None
    adapter: Mapping[str, np.ndarray] | None


@dataclass(frozen=True)
class EvalSpec:
    """What is evaluated, and when; beside that always after the last step.

    Attributes:
        every_steps, every_epochs: one of them is None.
        max_samples: the first so many rows alone; None takes all.
    """

    data: DataSpec
    every_steps: int | None
    every_epochs: int | None
    max_samples: int | None


@dataclass(frozen=True)
class RunSpec:
    """Everything a worker needs.

    Attributes:
        steps, epochs: how long; one of them is None.
        eval: None evaluates nothing.
        platform: what JAX must run on, e.g. "tpu" or "cpu"; a silent fall-back is an error.
        num_workers: processes that must have met.
        num_devices: that they must have together; None where only the accelerator knows.
        directory: the run's.
        checkpointer: where the run is saved and goes on from; None saves nothing.
        snapshots: adapters written while it goes on; None writes none.
        log_steps_interval: steps between two rows of the history.
        limits: seconds without progress that end the run.
        callbacks: told on rank 0 what happens.
        profiler: which steps are traced on rank 0; None traces none.
        settings: the run's arguments as run.json has them, for callbacks.
        plan: what was planned for the slice; None without a plan.
        called, submitted: when the driver began, and when it asked for the workers, in seconds since the epoch.
        channel: what the ranks tell the head by, and send to it.
    """

    model: ModelSpec
    train: DataSpec
    steps: int | None
    epochs: int | None
    eval: EvalSpec | None
    step: StepSettings
    platform: str
    num_workers: int
    num_devices: int | None
    directory: str
    checkpointer: Checkpointer | None
    snapshots: Snapshots | None
    log_steps_interval: int
    limits: Limits
    callbacks: Sequence[Callback]
    profiler: Profiler | None
    settings: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    called: float
    submitted: float
    channel: Channel = field(repr=False, compare=False)
