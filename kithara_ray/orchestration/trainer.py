"""The Trainer of the public API: handles in, a trained adapter out.

The driver tokenises, starts the coordinator and one Ray Train actor per host, shows progress, and takes the gathered
adapter. It needs no accelerator.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig

from kithara_ray.callbacks import Callback, Profiler, TensorBoard
from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.model.options import REMAT
from kithara_ray.orchestration import request
from kithara_ray.orchestration.cluster.connection import start_ray
from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.data.data_spec import DataSpec
from kithara_ray.orchestration.data.datasets import Dataloader
from kithara_ray.orchestration.data.held_out import tokenized_stores
from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.orchestration.data.unbounded import EndlessStore
from kithara_ray.orchestration.driver.progress import Progress
from kithara_ray.orchestration.driver.run_manifest import RunManifest
from kithara_ray.orchestration.driver.samples import Samples
from kithara_ray.orchestration.head import adapters
from kithara_ray.orchestration.head.ray_channel import RayChannel
from kithara_ray.orchestration.model import KerasHubModel
from kithara_ray.orchestration.preflight import checks, memory_fit
from kithara_ray.orchestration.results import TrainResult, about, raise_for_end, result_of
from kithara_ray.orchestration.worker import callback_runner
from kithara_ray.orchestration.worker.channel import AdapterSpec
from kithara_ray.orchestration.worker.entry import Entry, Loop
from kithara_ray.orchestration.worker.event_log import Event, one_history
from kithara_ray.orchestration.worker.heartbeat import Limits
from kithara_ray.orchestration.worker.snapshots import Snapshots
from kithara_ray.orchestration.worker.spec import EvalSpec, ModelSpec, RunSpec, StepSpec
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.storage.places import Place
from kithara_ray.storage.urls import absolute, is_url, join
from kithara_ray.train.optimizer_config import portable

logger = logging.getLogger(__name__)

# A process tells each second that it is there; one that is frozen, or whose host is, tells nothing.
_SILENCE_TIMEOUT_S = 60.0
# What every worker runs, imported there; the driver needs none of it. Tests put a loop of their own.
TRAIN_LOOP: str | Loop = "kithara_ray.orchestration.worker.run:train_loop"


class Trainer:
    """Trains a model on a Ray cluster.

    Args:
        model: what to train; afterwards it holds the trained adapter, or knows where the trained weights are.
        optimizer: a `keras.optimizers.Optimizer` or an `optax.GradientTransformation`.
        train_dataloader: rows and batch size; the global batch is `per_device_batch_size` x all devices
            x `gradient_accumulation_steps`.
        eval_dataloader: evaluated every `eval_steps_interval` steps or `eval_epochs_interval` epochs (each epoch by
            default), and at the end. Or give train_dataloader an `eval_fraction`.
        steps, epochs: how long; one epoch by default.
        log_steps_interval: steps between two rows of the history.
        max_eval_samples: evaluate on the first so many rows only.
        tensorboard_dir: where TensorBoard's event files go: on rank 0's host, or `gs://...`, `s3://...`.
        profiler: a `Profiler`: which steps are traced, and where the trace goes.
        checkpointer: saves the run, and lets it go on from where it ended; None saves nothing, unless run_config's
            failure_config or checkpoint_config ask for it.
        scaling_config: Ray's; one worker per host. None is one local worker.
        run_config: Ray's: name, storage_path, failure_config, worker_runtime_env.
        cpu_devices_per_worker: without an accelerator, so many CPU devices in each worker.
        mesh: axes of the device mesh; by default the devices of a TPU slice on `fsdp`, the slices on `data`.
        remat: what the blocks keep for the backward pass: "block", their input alone, the rest is computed again;
            "dots", also the results of products with weights, faster where the memory is there; "nested", the inputs
            of a few blocks, slower by a forward pass, for the largest models.
        gradient_accumulation_steps: forward and backward passes of one step. The loss is the mean over the tokens of
            all of them together, so 1 x 8 rows and 8 x 1 row train alike.
        seed: of the initial factors and of dropout.
        on_nan: what to do with a step whose loss or gradient is not finite: "stop" names its rows and ends the run,
            "skip" leaves parameters and optimizer as they were.
        step_timeout_s: without progress for so long, the run is ended by the name of the rank that holds it up; None
            waits for ever.
        startup_timeout_s: the same, for each phase before the first step.
        export_every_steps: write the adapter of every so many steps while training goes on, as a PEFT directory.
        export_dir: where these go, `<export_dir>/step-000100`: local to the head node, or `gs://...`, `s3://...`;
            `adapters` in the run's directory by default.
        cluster_timeout_s: how long to wait for the cluster to have, and to have free, what scaling_config asks for.
        callbacks: `kithara_ray.Callback` objects, told on rank 0 what happens; they may end the run.
        report_prompts: texts or chats that `generate` continues before and after training, for report.html in the
            run's directory. It decodes on one CPU: for small models.
        report_max_length: tokens of prompt and continuation there.
        progress: show a progress bar, or lines where the output is not a terminal.
    """

    def __init__(
        self,
        model: KerasHubModel,
        optimizer: Any,
        train_dataloader: Dataloader,
        eval_dataloader: Dataloader | None = None,
        steps: int | None = None,
        epochs: int | None = None,
        log_steps_interval: int = 1,
        eval_steps_interval: int | None = None,
        eval_epochs_interval: int | None = None,
        max_eval_samples: int | None = None,
        tensorboard_dir: str | None = None,
        profiler: Profiler | None = None,
        checkpointer: Any = None,
        *,
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        cpu_devices_per_worker: int = 1,
        mesh: MeshShape | None = None,
        remat: str = "block",
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        on_nan: str = "stop",
        step_timeout_s: float | None = 600.0,
        startup_timeout_s: float = 3600.0,
        export_every_steps: int | None = None,
        export_dir: str | None = None,
        cluster_timeout_s: float = 300.0,
        callbacks: Sequence[Callback] = (),
        report_prompts: Sequence[str | list[dict[str, str]]] = (),
        report_max_length: int = 256,
        progress: bool = True,
    ):
        if steps is not None and epochs is not None:
            raise ConfigError(f"Trainer takes one of steps and epochs, got steps={steps} and epochs={epochs}")
        if eval_steps_interval is not None and eval_epochs_interval is not None:
            raise ConfigError("Trainer takes one of eval_steps_interval and eval_epochs_interval")
        _check_counts(
            steps=steps,
            epochs=epochs,
            log_steps_interval=log_steps_interval,
            eval_steps_interval=eval_steps_interval,
            eval_epochs_interval=eval_epochs_interval,
            max_eval_samples=max_eval_samples,
            gradient_accumulation_steps=gradient_accumulation_steps,
            export_every_steps=export_every_steps,
            report_max_length=report_max_length,
        )
        _check_endless(train_dataloader, eval_dataloader, steps, max_eval_samples)
        _check_one_of("remat", remat, REMAT)
        _check_one_of("on_nan", on_nan, ("stop", "skip"))
        self.model = model
        self.optimizer = portable(optimizer)
        self.train_dataloader, self.eval_dataloader = train_dataloader, eval_dataloader
        self.steps, self.epochs = steps, 1 if steps is None and epochs is None else epochs
        self.evaluates = request.evaluates(train_dataloader, eval_dataloader)
        if self.evaluates and eval_steps_interval is None and eval_epochs_interval is None:
            eval_epochs_interval = 1
        self.eval_steps_interval, self.eval_epochs_interval = eval_steps_interval, eval_epochs_interval
        self.log_steps_interval, self.max_eval_samples = log_steps_interval, max_eval_samples
        self.mesh, self.remat, self.seed, self.on_nan = mesh, remat, seed, on_nan
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.scaling_config = scaling_config or ScalingConfig(num_workers=1)
        self.run_config = run_config or RunConfig()
        self.group = WorkerGroup(self.scaling_config, self.run_config, cpu_devices_per_worker, cluster_timeout_s)
        self.checkpointer = request.choose(checkpointer, self.run_config, self.evaluates)
        self.snapshots = _snapshots(export_every_steps, export_dir, self.run_config, model)
        save_timeout_s = self.checkpointer.save_timeout_s if self.checkpointer else 0.0
        self.limits = Limits(step_timeout_s, startup_timeout_s, save_timeout_s, _SILENCE_TIMEOUT_S)
        self.callbacks = callback_runner.checked(callbacks)
        self.tensorboard_dir = tensorboard_dir and absolute(str(tensorboard_dir))
        self.profiler = _profiler(profiler)
        self.report_prompts, self.report_max_length = _prompts(report_prompts), report_max_length
        self.progress = progress
        self.config: Mapping[str, Any] | None = None  # the YAML that this was made of

    def train(self, exports: Sequence[Mapping[str, Any]] = ()) -> TrainResult:
        """Run to the end; `model` has what was trained afterwards.

        Args:
            exports: arguments of the `save_in_hf_format` calls that will follow. Nothing is written; that it can be is
                checked before anything is trained.

        Raises:
            DataError: a bad row, or nothing to train on.
            ConfigError: the step does not fit the chips of the TPU slice; what to try.
            DestinationError: the run's directory, an export's or `export_dir` cannot be written, or holds adapters of
                another run.
            ClusterError: the cluster lacks what `scaling_config` asks for.
            TrainingError: a worker failed; names its cause. Or a callback did; the adapter of that step is in `model`.
            KeyboardInterrupt: the run was interrupted; the adapter so far is in `model`, and saved.
        """
        start_ray()
        self.model.release()
        coordinator = self.model.coordinator()
        ray.get(coordinator.start_run.remote())
        manifest = RunManifest(self)
        if self.snapshots is not None:
            remote_get(coordinator.check_snapshots.remote(self.snapshots, self.checkpointer is not None))
        samples = Samples(self.model, self.report_prompts, self.report_max_length)
        with Progress(coordinator, enabled=self.progress) as progress:
            spec = self._prepared(coordinator, manifest, exports, samples, progress)
            try:
                ended = self.group.run(Entry(TRAIN_LOOP), {"spec": spec}, coordinator, 2 * _SILENCE_TIMEOUT_S)
            except BaseException as error:
                manifest.end(coordinator, "failed", error=f"{type(error).__name__}: {error}")
                manifest.write_report(coordinator, {"events": _events_so_far(coordinator), "samples": samples.rows})
                raise
        events, summary = remote_get(coordinator.events.remote(0)), ended.return_value
        # Ray names a directory on an object store without its scheme.
        directory = ended.path if Place(spec.directory).is_local else spec.directory
        result = result_of(events, directory, summary)
        told = self._described(coordinator, manifest, result, summary)
        self.model.run, self.model.run_directory = told | about(spec, events), manifest.directory
        where = self._take(coordinator, spec, summary, directory)
        samples.take("after")
        manifest.write_report(coordinator, {"events": one_history(events), "samples": samples.rows})
        raise_for_end(summary, where)
        return result

    def _prepared(
        self,
        coordinator: ray.actor.ActorHandle,
        manifest: RunManifest,
        exports: Sequence[Mapping[str, Any]],
        samples: Samples,
        progress: Progress,
    ) -> RunSpec:
        """All that comes before the workers: checks, tokenised data, a plan; run.json is there, and so is room."""
        progress.phase("check")
        checks.raise_for(checks.check_run(self, exports, self.group.cluster_timeout_s))
        if self.report_prompts:
            progress.phase("sample")
            samples.take("before")
        progress.phase("tokenize")
        spec = self._spec(coordinator, manifest.told()["settings"], called=time.time())
        if self.scaling_config.use_tpu:
            progress.phase("plan")
        spec = memory_fit.fitted(spec, self.scaling_config, self.train_dataloader.per_device_batch_size == "auto")
        progress.phase("schedule")
        self.group.wait()
        manifest.begin(coordinator, spec)
        return spec

    def _described(
        self,
        coordinator: ray.actor.ActorHandle,
        manifest: RunManifest,
        result: TrainResult,
        summary: Mapping[str, Any],
    ) -> dict[str, Any]:
        """run.json of the run that has ended."""
        problem = summary.get("callback_error")
        more = {name: getattr(result, name) for name in ("path", "metrics", "phases", "stopped")}
        failed = {"error": problem} if problem else {}
        return manifest.end(coordinator, "failed" if problem else "finished", result=more, **failed)

    def _take(
        self, coordinator: ray.actor.ActorHandle, spec: RunSpec, summary: Mapping[str, Any], directory: str
    ) -> str:
        """Hand what was trained from the coordinator to the model; returns where it is written.

        Args:
            directory: the run's. One that only the user's own file system reaches gets no adapter.
        """
        model = self.model
        if model.lora is None:
            model.set_trained(remote_get(coordinator.publish_weights.remote(spec.num_workers)))
            return directory
        made = AdapterSpec(model.preset_handle, model.lora, summary["shapes"], spec.num_workers)
        model.set_adapter(remote_get(coordinator.adapter.remote(made, summary.get("checkpoint"))))
        if not (is_url(directory) or os.path.isabs(directory)):
            return directory
        return adapters.ask(coordinator.write_adapter.remote, model.adapter_ref(directory), model.adapter)

    def _spec(self, coordinator: ray.actor.ActorHandle, settings: Mapping[str, Any], called: float) -> RunSpec:
        """Tokenises the data. called: when `train()` was, in seconds since the epoch."""
        model, board = self.model, [TensorBoard(self.tensorboard_dir)] if self.tensorboard_dir else []
        evaluation = None
        given = (self.train_dataloader, self.eval_dataloader, self.max_eval_samples, self.model.vocabulary)
        stores = tokenized_stores(*given)
        train = self._data(self.train_dataloader, stores[0], self.gradient_accumulation_steps)
        if self.evaluates:
            when = (self.eval_steps_interval, self.eval_epochs_interval, self.max_eval_samples)
            evaluation = EvalSpec(self._data(self.eval_dataloader or self.train_dataloader, stores[1]), *when)
        return RunSpec(
            model=ModelSpec(model.weights_handle, model.lora, model.precision, model.quantize, model.adapter),
            train=train,
            steps=self.steps,
            epochs=self.epochs,
            eval=evaluation,
            step=StepSpec(
                optimizer=self.optimizer,
                mesh=self.mesh,
                remat=self.remat,
                micro_batches=self.gradient_accumulation_steps,
                seed=self.seed,
                on_nan=self.on_nan,
            ),
            platform=self.group.platform,
            num_workers=self.group.num_workers,
            num_devices=checks.count_devices(self),
            directory=join(self.group.storage, self.run_config.name),
            checkpointer=self.checkpointer,
            snapshots=self.snapshots,
            log_steps_interval=self.log_steps_interval,
            limits=self.limits,
            callbacks=(callback_runner.RayMetrics(), *board, *self.callbacks),
            profiler=self.profiler,
            settings=settings,
            plan=None,
            called=called,
            submitted=time.time(),
            channel=RayChannel(coordinator),
        )

    def _data(self, loader: Dataloader, store: TokenStore | EndlessStore, micro_batches: int = 1) -> DataSpec:
        # "auto" begins with one row; see memory_fit.fitted.
        rows = 1 if loader.per_device_batch_size == "auto" else loader.per_device_batch_size
        return DataSpec(
            store=store,
            rows_per_device=rows * micro_batches,
            packed_len=loader.dataset.max_seq_len if loader.packing else None,
            buckets=loader.length_buckets,
            shuffle=loader.shuffle,
            shuffle_rows=loader.shuffle_rows,
            seed=loader.seed,
        )


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"Trainer: {name} must be an integer >= 1, got {value!r}")


def _check_one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"Trainer: {name} must be one of {', '.join(choices)}, got {value!r}")


def _check_endless(train: Dataloader, evaluation: Dataloader | None, steps: int | None, rows: int | None) -> None:
    if train.dataset.is_endless and steps is None:
        raise ConfigError("the training data streams, so nobody knows when an epoch ends; give steps=")
    if evaluation is not None and evaluation.dataset.is_endless and rows is None:
        raise ConfigError("the evaluation data streams and has no end; give max_eval_samples=")


def _snapshots(
    every: int | None, directory: str | None, run_config: RunConfig, model: KerasHubModel
) -> Snapshots | None:
    if every is None:
        if directory is not None:
            raise ConfigError("Trainer: export_dir= says where export_every_steps= writes; give both, or neither")
        return None
    if directory is not None and directory.startswith("hf://"):
        raise UnsupportedError("Trainer: export_dir must be a directory or on an object store, not a Hub repository")
    if model.lora is None:
        raise UnsupportedError(
            "Trainer: export_every_steps= writes adapters, and all weights of this model are trained; give a "
            "checkpointer, or lora_rank="
        )
    default = join(str(run_config.storage_path), run_config.name, "adapters")
    return Snapshots(every, absolute(str(directory or default)))


def _profiler(given: Any) -> Profiler | None:
    """With the place that the driver means."""
    if given is None:
        return None
    if not isinstance(given, Profiler):
        raise ConfigError(
            f"Trainer: profiler must be a kithara_ray.Profiler(directory, steps=(first, last)), "
            f"got {type(given).__name__}"
        )
    return Profiler(absolute(str(given.directory)), given.steps)


def _prompts(given: Any) -> list[Any]:
    if isinstance(given, str):
        raise ConfigError(f"Trainer: report_prompts must be a list of prompts, got the text {given[:40]!r}")
    return list(given)


def _events_so_far(coordinator: ray.actor.ActorHandle) -> list[Event]:
    """Of a run that has failed."""
    try:
        return one_history(ray.get(coordinator.events.remote(0), timeout=30))
    except ray.exceptions.RayError as error:
        logger.warning("the history of the run is lost: %s", error)
        return []
