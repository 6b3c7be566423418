"""The user's complete request for one run: a frozen value that the Trainer makes from its arguments.

Checks, probes, the plan, run.json and the trials of a search take it; none of them sees a Trainer. `facts` computes
values that follow from it. The worker's `RunSpec` holds the driver's later decisions about rows and tokens.
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
        preset_handle: location of the base.
        weights_handle: location that training reads weights from: the base, or weights that an earlier run trained.
        lora: LoRA settings; None trains all weights.
        precision: Keras dtype policy.
        quantize: storage of the frozen kernels: "int8", "int4", "nf4", or None for the base's dtype.
        starts_from_adapter: True if training continues an adapter; otherwise it starts from PEFT's initial factors.
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
        mesh: axes of the device mesh; None until the checks choose it, see `preflight.mesh`.
        remat: values that the blocks keep for the backward pass, one of `kithara_ray.model.options.REMAT`; "auto" until
            `preflight.choice` has filled it in.
        micro_batches: parts of a step's rows that go through the model one after the other.
        seed: seed of the initial factors and of dropout.
        on_nan: "stop" or "skip", for a step whose loss or gradient is not finite.
        router_aux_loss_coef: factor of the routers' auxiliary loss; 0 leaves it out.
    """

    optimizer: tuple[str, Any]
    mesh: MeshShape | None
    remat: str
    micro_batches: int
    seed: int
    on_nan: str
    router_aux_loss_coef: float = 0.0


@dataclass(frozen=True)
class EvalRequest:
    """The evaluation data, and the times of evaluation. The run also evaluates after the last step.

    Attributes:
        every_steps, every_epochs: interval of evaluations; one of them is None.
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
        step_s: limit between two steps; None waits forever.
        startup_s: limit of each phase before the first step.
    """

    step_s: float | None
    startup_s: float


@dataclass(frozen=True)
class Reporting:
    """The outputs that report on the run, and their intervals.

    Attributes:
        log_steps_interval: number of steps between two rows of the history.
        callbacks: callbacks that rank 0 calls.
        tensorboard_dir: directory for TensorBoard's event files; None writes none.
        profiler: the profiler, which sets the steps that rank 0 traces; None traces none.
        prompts: prompts that `generate` continues before and after training, for report.html.
        max_length: maximum tokens of a prompt and its continuation.
        progress: show a progress bar, or lines if the output is not a terminal.
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
    """One run, as the user requested it.

    Attributes:
        model: handle, LoRA, precision.
        train: training data, and its division into batches.
        evaluation: the evaluation; None evaluates nothing.
        steps, epochs: length of the run; one of them is None.
        step: the computation of a step.
        group: workers, storage, failure policy.
        checkpointer: saves the run and resumes it; None saves nothing.
        snapshots: adapters to export during training; None exports none.
        timeouts: limits on a run without progress.
        reporting: callbacks, logs, samples.
        config: the YAML that describes the run; None for a run written in Python.
        default_mesh: figures that `step.mesh` was chosen by; None before the checks, and for a mesh that was given.
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
    default_mesh: Mapping[str, Any] | None = None

    @property
    def directory(self) -> str:
        """The run's directory."""
        return join(self.group.storage, self.group.name)

    def loaders(self) -> Iterator[tuple[str, Dataloader]]:
        """Yield each Dataloader under the name of its argument."""
        yield "train_dataloader", self.train
        if self.evaluation is not None and self.evaluation.loader is not self.train:
            yield "eval_dataloader", self.evaluation.loader
