"""The Trainer of the public API: it takes the model and data handles, and leaves a trained adapter in the model.

The driver tokenises the data, starts the coordinator and one Ray Train actor per host, shows progress, and receives the
gathered adapter. It needs no accelerator.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig

from kithara_ray.callbacks import Callback, Profiler
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.tower import text_of
from kithara_ray.model.families.moe import check_router_loss
from kithara_ray.model.options import AUTO, REMAT
from kithara_ray.orchestration.cluster.connection import start_ray
from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.data.datasets import Dataloader
from kithara_ray.orchestration.driver.kept_tokenizer import prompting_of
from kithara_ray.orchestration.driver.progress import Progress
from kithara_ray.orchestration.driver.run_manifest import RunManifest
from kithara_ray.orchestration.driver.run_spec import loading_tokenizers, run_spec, tokenized
from kithara_ray.orchestration.driver.samples import Samples
from kithara_ray.orchestration.head.ray_channel import RayChannel
from kithara_ray.orchestration.model import KerasHubModel
from kithara_ray.orchestration.preflight import choice
from kithara_ray.orchestration.preflight.checks import check_run
from kithara_ray.orchestration.preflight.findings import raise_for
from kithara_ray.orchestration.prompting import keep_tokenizer
from kithara_ray.orchestration.request import arguments
from kithara_ray.orchestration.request.run_request import ModelRequest, Reporting, RunRequest, StepSettings, Timeouts
from kithara_ray.orchestration.results import TrainResult, about, raise_for_end, result_of
from kithara_ray.orchestration.worker import callback_runner
from kithara_ray.orchestration.worker.channel import AdapterSpec
from kithara_ray.orchestration.worker.entry import Entry, Loop
from kithara_ray.orchestration.worker.event_log import Event, one_history
from kithara_ray.orchestration.worker.spec import RunSpec
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.storage.places import Place
from kithara_ray.storage.urls import absolute, is_url
from kithara_ray.train.optimizer_config import portable

logger = logging.getLogger(__name__)

# The loop that each worker imports and runs; the driver never imports it. Tests substitute their own loop.
TRAIN_LOOP: str | Loop = "kithara_ray.orchestration.worker.run:train_loop"


class Trainer:
    """Train a model on a Ray cluster.

    Args:
        model: the model to train. After training it holds the adapter, or the location of the trained weights.
        optimizer: a `keras.optimizers.Optimizer` or an `optax.GradientTransformation`.
        train_dataloader: rows and batch size. The global batch is `per_device_batch_size` x all devices
            x `gradient_accumulation_steps`.
        eval_dataloader: evaluation rows. Evaluation runs every `eval_steps_interval` steps or `eval_epochs_interval`
            epochs (each epoch by default), and at the end. Alternatively, give train_dataloader an `eval_fraction`.
        steps, epochs: length of the run; one epoch by default.
        log_steps_interval: number of steps between two rows of the history.
        max_eval_samples: evaluate on the first `max_eval_samples` rows only.
        tensorboard_dir: directory for TensorBoard's event files, on rank 0's host or at `gs://...`, `s3://...`.
        profiler: a `Profiler`, which sets the steps to trace and the trace's location.
        checkpointer: saves the run and lets it resume. With None nothing is saved, unless run_config's failure_config
            or checkpoint_config ask for it.
        scaling_config: Ray's ScalingConfig, with one worker per host. None means one local worker.
        run_config: Ray's RunConfig: name, storage_path, failure_config, worker_runtime_env.
        cpu_devices_per_worker: number of CPU devices in each worker when there is no accelerator.
        mesh: axes of the device mesh. By default the planner chooses between weights on every device, all devices on
            `data`, and split weights, the devices of a TPU slice on `fsdp` and the slices on `data`. On CPU devices,
            and where no program can be compiled, a model whose whole state is small beside a device's memory is on
            every device. The losses do not depend on it.
        remat: values that the blocks keep for the backward pass. "auto" takes the fastest policy that fits, see
            docs/plan.md. "block" keeps each block's input only and recomputes the rest. "attention" also keeps
            attention's output, which is slow for long rows. "projections" also keeps queries, keys, values and the
            result of attention's last product. "dots" keeps the results of all products with weights: fastest, if
            memory allows. "offload" keeps what "projections" keeps, and the blocks' inputs, in the host's memory.
            "nested" keeps the inputs of a few blocks only: one forward pass slower, for the largest models.
        gradient_accumulation_steps: forward and backward passes per step. The loss is the mean over the tokens of all
            of them together, so 1 x 8 rows and 8 x 1 row train alike.
        seed: seed of the initial factors and of dropout.
        on_nan: response to a step whose loss or gradient is not finite. "stop" names the step's rows and ends the run;
            "skip" leaves parameters and optimizer unchanged.
        router_aux_loss_coef: factor of the auxiliary loss that evens the load of a mixture's experts, in place of
            config.json's field of this name; None leaves it out. The history's loss never contains it.
        step_timeout_s: seconds without progress after which the run ends with an error that names the rank holding it
            up. None waits forever.
        startup_timeout_s: the same limit for each phase before the first step.
        export_every_steps: during training, write the adapter as a PEFT directory every `export_every_steps` steps.
        export_dir: parent of these directories, `<export_dir>/step-000100`: local to the head node, or `gs://...`,
            `s3://...`. The default is `adapters` in the run's directory.
        cluster_timeout_s: seconds to wait until the cluster has the resources of scaling_config, and has them free.
        callbacks: `kithara_ray.Callback` objects. Rank 0 calls them, and they may end the run.
        report_prompts: texts or chats that `generate` continues before and after training, for report.html in the
            run's directory. Decoding runs on one CPU, so use this for small models.
        report_max_length: maximum tokens of prompt and continuation in the report.
        progress: show a progress bar, or lines if the output is not a terminal.
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
        remat: str = AUTO,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        on_nan: str = "stop",
        router_aux_loss_coef: float | None = None,
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
        arguments.check_at_most_one(steps=steps, epochs=epochs)
        arguments.check_at_most_one(eval_steps_interval=eval_steps_interval, eval_epochs_interval=eval_epochs_interval)
        arguments.check_counts(
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
        arguments.check_endless(train_dataloader, eval_dataloader, steps, max_eval_samples)
        arguments.check_one_of("remat", remat, (AUTO, *REMAT))
        arguments.check_one_of("on_nan", on_nan, ("stop", "skip"))
        self.model = model
        evaluated = arguments.evaluated_of(train_dataloader, eval_dataloader)
        arguments.check_factor("router_aux_loss_coef", router_aux_loss_coef)
        if router_aux_loss_coef:
            check_router_loss(text_of(BaseCheckpoint.at(model.preset_handle).config))
        step = StepSettings(
            portable(optimizer), mesh, remat, gradient_accumulation_steps, seed, on_nan, router_aux_loss_coef or 0.0
        )
        scaling_config, run_config = scaling_config or ScalingConfig(num_workers=1), run_config or RunConfig()
        self.request = RunRequest(
            model=_asked_of(model),
            train=train_dataloader,
            evaluation=arguments.evaluation_of(evaluated, eval_steps_interval, eval_epochs_interval, max_eval_samples),
            steps=steps,
            epochs=1 if steps is None and epochs is None else epochs,
            step=step,
            group=WorkerGroup(scaling_config, run_config, cpu_devices_per_worker, cluster_timeout_s),
            checkpointer=arguments.checkpointer_of(checkpointer, run_config, evaluated is not None),
            snapshots=arguments.snapshots_of(export_every_steps, export_dir, run_config, model.lora is not None),
            timeouts=Timeouts(step_timeout_s, startup_timeout_s),
            reporting=Reporting(
                log_steps_interval=log_steps_interval,
                callbacks=callback_runner.checked(callbacks),
                tensorboard_dir=tensorboard_dir and absolute(str(tensorboard_dir)),
                profiler=arguments.profiler_of(profiler),
                prompts=arguments.prompts_of(report_prompts),
                max_length=report_max_length,
                progress=progress,
            ),
        )

    def adopt(self, request: RunRequest) -> None:
        """Replace this Trainer's request with `request`; a search uses this to place each trial's run."""
        self.request = request

    def train(self, exports: Sequence[Mapping[str, Any]] = ()) -> TrainResult:
        """Run to the end, and leave the trained adapter or weights in `model`.

        Args:
            exports: arguments of the `save_in_hf_format` calls that will follow. Nothing is written for them; the
                driver checks before training that each can be written.

        Raises:
            DataError: a row is bad, or there is nothing to train on.
            ConfigError: the step does not fit the chips of the TPU slice. The message says what to try.
            DestinationError: the run's directory, an export's or `export_dir` cannot be written, or holds adapters of
                another run.
            ClusterError: the cluster lacks the resources that `scaling_config` asks for.
            TrainingError: a worker failed, and the message names the cause; or a callback failed, and `model` holds the
                adapter of that step.
            KeyboardInterrupt: the run was interrupted. The adapter so far is in `model`, and saved.
        """
        progress = Progress(self.request.reporting.progress)
        progress.phases.enter("connect")
        start_ray()
        self.model.unload()
        # An earlier training may have changed the model since the request was made.
        request = dataclasses.replace(self.request, model=_asked_of(self.model))
        manifest = RunManifest(request)
        self.model.prompting = prompting_of(request.train.dataset)
        tokenizers = loading_tokenizers(request, progress.phases)
        samples = Samples(self.model, request.reporting.prompts, request.reporting.max_length)
        with progress:
            progress.phase("check")
            found, request = check_run(request, exports, request.group.cluster_timeout_s)
            raise_for(found)
            progress.mesh(request)
            coordinator = self.model.coordinator()
            tokenizers.join()
            spec = self._prepared(request, coordinator, manifest, samples, progress)
            try:
                silence_s = spec.limits.silence_timeout_s
                ended = request.group.run(Entry(TRAIN_LOOP), {"spec": spec}, coordinator, 2 * silence_s)
            except BaseException as error:
                manifest.end(coordinator, "failed", error=f"{type(error).__name__}: {error}")
                manifest.write_report(coordinator, {"events": _events_so_far(coordinator), "samples": samples.rows})
                raise
        events, summary = remote_get(coordinator.events.remote(0)), ended.return_value
        assert summary is not None  # rank 0 of a run that ended well returns it
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
        request: RunRequest,
        coordinator: ActorHandle,
        manifest: RunManifest,
        samples: Samples,
        progress: Progress,
    ) -> RunSpec:
        """Prepare the run after its checks: take samples, tokenise, plan, wait for room and write run.json."""
        begun = coordinator.start_run.remote()  # starts the coordinator's process in the meantime
        request.group.begin()
        if request.reporting.prompts:
            progress.phase("sample")
            samples.take("before")
        progress.phase("tokenize")
        data = tokenized(request)
        if request.group.scaling_config.use_tpu:
            progress.phase("plan")
        request, fit = choice.fit(request, data.largest_shape(request))
        progress.chosen(fit)
        manifest.settle(request)
        progress.phase("schedule")
        settings, start = manifest.told()["settings"], progress.phases.start()
        spec = run_spec(request, data, fit, self.model.adapter, settings, RayChannel(coordinator), start)
        request.group.wait()
        ray.get(begun)
        progress.follow(coordinator)
        tokenizer = keep_tokenizer(self.model, request.train.dataset, spec, manifest.directory, coordinator)
        manifest.begin(coordinator, request, spec, tokenizer)
        return spec

    def _described(
        self,
        coordinator: ActorHandle,
        manifest: RunManifest,
        result: TrainResult,
        summary: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return run.json of the run that has ended."""
        problem = summary.get("callback_error")
        more = {name: getattr(result, name) for name in ("path", "metrics", "phases", "stopped")}
        failed = {"error": problem} if problem else {}
        return manifest.end(coordinator, "failed" if problem else "finished", result=more, **failed)

    def _take(self, coordinator: ActorHandle, spec: RunSpec, summary: Mapping[str, Any], directory: str) -> str:
        """Hand the trained tensors from the coordinator to the model, and return where they are written.

        Args:
            directory: the run's directory. No adapter is written to one that only the user's own file system reaches.
        """
        model = self.model
        if model.lora is None:
            model.set_trained(remote_get(coordinator.publish_weights.remote(spec.num_workers)))
            return directory
        made = AdapterSpec(model.preset_handle, model.lora, summary["shapes"], spec.num_workers)
        model.set_adapter(remote_get(coordinator.adapter.remote(made, summary.get("checkpoint"))))
        if not (is_url(directory) or os.path.isabs(directory)):
            return directory
        return model.ask_with_adapter(coordinator.write_adapter.remote, directory)


def _asked_of(model: KerasHubModel) -> ModelRequest:
    """Return a request for the model as it is now."""
    return ModelRequest(
        preset_handle=model.preset_handle,
        weights_handle=model.weights_handle,
        lora=model.lora,
        precision=model.precision,
        quantize=model.quantize,
        starts_from_adapter=model.adapter is not None,
    )


def _events_so_far(coordinator: ActorHandle) -> list[Event]:
    """Return the events of a run that has failed."""
    try:
        return one_history(ray.get(coordinator.events.remote(0), timeout=30))
    except RayError as error:
        logger.warning("the run's history is lost: %s", error)
        return []
