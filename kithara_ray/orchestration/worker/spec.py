"""The driver's decisions about a run: plain data that is sent to every worker process."""

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
    """The model to train, and its starting point.

    Attributes:
        base: handle or directory of the base checkpoint, or of weights from an earlier training.
        lora: LoRA settings; None trains all weights.
        precision: Keras dtype policy.
        quantize: storage of the frozen kernels: "int8", "int4", "nf4", or None for the base's dtype.
        adapter: tensors by name to continue from; None starts from PEFT's initial factors.
    """

    base: str
    lora: LoraConfig | None
    precision: str
    quantize: str | None
    adapter: Mapping[str, np.ndarray] | None


@dataclass(frozen=True)
class EvalSpec:
    """The evaluation data, and the times of evaluation. The run also evaluates after the last step.

    Attributes:
        every_steps, every_epochs: interval of evaluations; one of them is None.
        max_samples: evaluate on the first `max_samples` rows only; None takes all.
    """

    data: DataSpec
    every_steps: int | None
    every_epochs: int | None
    max_samples: int | None


@dataclass(frozen=True)
class Start:
    """The driver's part of a run's start.

    Attributes:
        began, submitted: beginning of `train()`, and of the request for the workers, in seconds since the epoch.
        phases: seconds of each phase between the two, in order.
        beside: (beginning, end) of work beside the phases, in seconds since `began`.
    """

    began: float
    submitted: float
    phases: Mapping[str, float] = field(default_factory=dict)
    beside: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSpec:
    """All inputs of a worker.

    Attributes:
        steps, epochs: length of the run; one of them is None.
        eval: the evaluation; None evaluates nothing.
        platform: platform that JAX must run on, e.g. "tpu" or "cpu"; a silent fall-back is an error.
        num_workers: number of processes that must meet.
        num_devices: number of devices that they must have together; None if only the accelerator knows.
        directory: the run's directory.
        checkpointer: saves the run and resumes it; None saves nothing.
        snapshots: adapters to export during training; None exports none.
        log_steps_interval: number of steps between two rows of the history.
        limits: seconds without progress that end the run.
        callbacks: callbacks that rank 0 calls.
        profiler: the profiler, which sets the steps that rank 0 traces; None traces none.
        settings: the run's arguments as in run.json, for callbacks.
        plan: the plan for the slice; None without a plan.
        start: the driver's part of the run's start.
        channel: the channel of the ranks to the head.
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
    start: Start
    channel: Channel = field(repr=False, compare=False)
