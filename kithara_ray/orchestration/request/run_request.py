"""Everything a user asked of one run, as a frozen value that the Trainer makes of its arguments.

Checks, probes, the plan, run.json and the trials of a search take it; none of them sees a Trainer. What follows from it
is in `facts`; what the driver decides later, about rows and tokens, is in the worker's `RunSpec`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kithara_ray.callbacks import Callback, Profiler
from kithara_ray.checkpoint.checkpointer import Checkpointer
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.data.datasets import Dataloader
from kithara_ray.orchestration.request.snapshots import Snapshots
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.storage.urls import join


@dataclass(frozen=True)
class ModelRequest:
    """The model to train, without its tensors.

    Attributes:
        preset_handle: where the base is.
        weights_handle: where training reads weights from: the base, or weights that an earlier run trained.
        lora: what is adapted; None trains all weights.
        precision: Keras dtype policy.
        quantize: what the frozen kernels are held as: "int8", or None as in the base.
        starts_from_adapter: training goes on from an adapter; without one it starts from PEFT's initial factors.
    """

    preset_handle: str
    weights_handle: str
    lora: LoraConfig | None
    precision: str
    quantize: str | None
    starts_from_adapter: bool


@dataclass(frozen=True)
class StepSettings:
    """The computation of one step, and its mesh.

    Attributes:
        optimizer: ("keras", config) or ("optax", transformation).
        mesh: axes of the device mesh; None lays it out by the devices.
        remat: what the blocks keep for the backward pass, one of `kithara_ray.model.options.REMAT`.
        micro_batches: parts of a step's rows that go through the model one after the other.
        seed: of the initial factors and of dropout.
        on_nan: "stop" or "skip", for a step whose loss or gradient is not finite.
    """

    optimizer: tuple[str, Any]
    mesh: MeshShape | None
    remat: str
    micro_batches: int
    seed: int
    on_nan: str


@dataclass(frozen=True)
class EvalRequest:
    """The evaluation data, and when it is evaluated; besides, always after the last step.

    Attributes:
        every_steps, every_epochs: one of them is None.
        max_samples: evaluate on the first rows only, up to this many; None takes all.
    """

    loader: Dataloader
    every_steps: int | None
    every_epochs: int | None
    max_samples: int | None


@dataclass(frozen=True)
class Timeouts:
    """Seconds without progress after which the run is ended.

    Attributes:
        step_s: between two steps; None waits for ever.
        startup_s: of each phase before the first step.
    """

    step_s: float | None
    startup_s: float


@dataclass(frozen=True)
class Reporting:
    """Who is told about the run, and how often.

    Attributes:
        log_steps_interval: steps between two rows of the history.
        callbacks: called on rank 0.
        tensorboard_dir: where TensorBoard's event files go; None writes none.
        profiler: which steps rank 0 traces; None traces none.
        prompts: what `generate` continues before and after training, for report.html.
        max_length: tokens of a prompt and its continuation.
        progress: show a progress bar, or lines where the output is not a terminal.
    """

    log_steps_interval: int
    callbacks: tuple[Callback, ...]
    tensorboard_dir: str | None
    profiler: Profiler | None
    prompts: tuple[str | Sequence[Mapping[str, str]], ...]
    max_length: int
    progress: bool


@dataclass(frozen=True)
class RunRequest:
    """One run, as the user asked for it.

    Attributes:
        model: handle, LoRA, precision.
        train: training data, and how it is cut into batches.
        evaluation: None evaluates nothing.
        steps, epochs: how long; one of them is None.
        step: what a step computes.
        group: workers, storage, failure policy.
        checkpointer: where the run is saved and resumes from; None saves nothing.
        snapshots: adapters written while training goes on; None writes none.
        timeouts: when a run without progress is ended.
        reporting: callbacks, logs, samples.
        config: the YAML that the run was made of; None for a run written in Python.
    """

    model: ModelRequest
    train: Dataloader
    evaluation: EvalRequest | None
    steps: int | None
    epochs: int | None
    step: StepSettings
    group: WorkerGroup
    checkpointer: Checkpointer | None
    snapshots: Snapshots | None
    timeouts: Timeouts
    reporting: Reporting
    config: Mapping[str, Any] | None = None

    @property
    def directory(self) -> str:
        """The run's directory."""
        return join(self.group.storage, self.group.run_config.name)

    def loaders(self) -> Iterator[tuple[str, Dataloader]]:
        """Each Dataloader under the name of its argument."""
        yield "train_dataloader", self.train
        if self.evaluation is not None and self.evaluation.loader is not self.train:
            yield "eval_dataloader", self.evaluation.loader
