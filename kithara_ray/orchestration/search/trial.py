"""One trial of a search: a full run. An actor drives it, and a trainable of Ray Tune watches that actor.

Tune puts everything that a trial starts into the trial's placement group. That group has room for the trainable only,
so a run's tasks, such as tokenising and reading, would wait there forever. The trainable therefore holds a sliver of
the head node and no CPU. An actor outside the group drives the run, as a script would. Ray ends an actor's children
with the actor, so a trial that is stopped or killed leaves nothing behind.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.train import ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kithara_ray.checkpoint.checkpointer import Checkpointer
from kithara_ray.checkpoint.run_files import CHECKPOINTS
from kithara_ray.errors import ClusterError, ConfigError, DivergedError, KitharaRayError, TrainingError
from kithara_ray.orchestration.cluster import ray_compat
from kithara_ray.orchestration.cluster.remote import remote_get, unpickled
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.orchestration.search.spaces import plain
from kithara_ray.orchestration.trainer import Trainer
from kithara_ray.redact import redact
from kithara_ray.storage.urls import join

RUN = "run"  # name of the run's directory in the trial's directory
FINISHED, REFUSED = "finished", "refused"  # keys of a trial's last report, with path and reason
_POLL_S = 1.0
_SLIVER = 0.001
_SHOWN = 200  # maximum characters of Ray's message about a process that died
_TURN_S = 30 * 24 * 3600.0  # a trial's wait for its turn; the first trial has shown that the cluster can hold one
# The driver computes nothing, and must not take an accelerator from the workers of its host.
_DRIVER_ENV = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


@dataclass(frozen=True)
class TrialSettings:
    """The settings that all trials of a search share.

    Attributes:
        make: function from a point to its Trainer, in cloudpickle bytes, so that the trial reports a failure to load
            it.
        directory: the search's directory.
        metric, mode: the metric that ranks the trials, and "min" or "max".
        workers: each trial's request to the cluster, as returned by `workers_of`.
        cwd: directory that relative paths start from.
    """

    make: bytes
    directory: str
    metric: str
    mode: str
    workers: tuple
    cwd: str


def workers_of(scaling: ScalingConfig) -> tuple:
    """Return a run's request to the cluster; equal for trials that take equal room."""
    needs = tuple(sorted(ray_compat.resources_per_worker(scaling).items()))
    return scaling.num_workers, needs, scaling.topology, scaling.accelerator_type


def trial_directory(search: str, trial_id: str) -> str:
    """Return the run's directory of a trial."""
    return join(search, trial_id, RUN)


def placed(request: RunRequest, directory: str, metric: str, mode: str) -> RunRequest:
    """Return the request with all its output placed below the trial's directory, and with a long wait for its turn.

    Args:
        directory: the run's directory, see `trial_directory`.
    """
    parent, _, name = directory.rpartition("/")
    trial_id = parent.rpartition("/")[2]
    run_config = dataclasses.replace(request.group.run_config, storage_path=parent, name=name)
    reporting, snapshots = request.reporting, request.snapshots
    board, profiler = reporting.tensorboard_dir, reporting.profiler
    return dataclasses.replace(
        request,
        group=dataclasses.replace(request.group, run_config=run_config, cluster_timeout_s=_TURN_S),
        checkpointer=_checkpointer(request.checkpointer, join(directory, CHECKPOINTS), metric, mode),
        snapshots=snapshots and dataclasses.replace(snapshots, directory=join(directory, "adapters")),
        reporting=dataclasses.replace(
            reporting,
            tensorboard_dir=board and join(board, trial_id),
            profiler=profiler and dataclasses.replace(profiler, directory=join(profiler.directory, trial_id)),
            progress=False,
        ),
    )


def _checkpointer(given: Checkpointer | None, directory: str, metric: str, mode: str) -> Checkpointer:
    """Return the trial's checkpointer. By default it saves at each evaluation, so a killed trial resumes there."""
    if given is not None:
        return dataclasses.replace(given, checkpoint_dir=directory)
    score = metric if metric.startswith("eval_") else None
    return Checkpointer(directory, max_to_keep=2, score_attribute=score, score_order=mode)


class TrialDriver:
    """The process that drives a trial's run, as a script would."""

    def __init__(self, settings: TrialSettings):
        self._settings = settings
        # Relative paths start from the search's own working directory, if that directory exists here too.
        with contextlib.suppress(OSError):
            os.chdir(settings.cwd)

    def prepare(self, point: Mapping[str, Any], directory: str) -> ActorHandle:
        """Make the Trainer; return the run's coordinator. Raises the errors of the Trainer and its parts."""
        settings = self._settings
        try:
            make = unpickled(settings.make)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the trainer_factory cannot be loaded in a trial's process: {error}; define what it uses in the "
                "script itself, or install it on the head node"
            ) from error
        self._trainer = self._placed(make(plain(point)), directory)
        return self._trainer.model.coordinator()

    def _placed(self, trainer: Trainer, directory: str) -> Trainer:
        """Return the Trainer moved below its trial's directory, without actors of the process that made it."""
        workers = workers_of(trainer.request.group.scaling_config)
        if workers != self._settings.workers:
            raise ConfigError(
                f"this trial asks for workers that differ from the search's: {workers}, not "
                f"{self._settings.workers}; give all trials one scaling_config"
            )
        trainer.adopt(placed(trainer.request, directory, self._settings.metric, self._settings.mode))
        trainer.model.detach()
        return trainer

    def train(self) -> dict[str, Any]:
        """Run to the end; return the trial's last report."""
        trainer, metric = self._trainer, self._settings.metric
        result = trainer.train()
        if metric not in result.metrics:
            raise ConfigError(f"metric={metric!r} is not logged; there are {', '.join(sorted(result.metrics))}")
        weights = {"weights": trainer.model.trained} if trainer.model.lora is None else {}
        return {**result.metrics, FINISHED: result.path, "stopped": result.stopped, **weights}


class Reports:
    """Turn a run's events into reports to Tune, one each time the metric is known, except at the end of the run.

    The last report waits until everything is written. A scheduler that stops a trial for that report interrupts
    nothing.
    """

    def __init__(self, metric: str):
        self._metric = metric
        self._known: dict[str, Any] = {}
        self._total_steps: int | None = None

    def of(self, events: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for event in events:
            if event["kind"] == "started":
                self._total_steps = event["total_steps"]
            elif event["kind"] in ("step", "eval"):
                values = {name: value for name, value in event.items() if name != "kind"}
                self._known |= values
                if self._metric in values and values["step"] != self._total_steps:
                    yield dict(self._known)


def trainable(settings: TrialSettings) -> Callable[[dict[str, Any]], None]:
    """Return the function that Tune runs per trial. It reports an error that no retry can fix as the worst metric."""

    def trial(point: dict[str, Any]) -> None:
        directory = trial_directory(settings.directory, ray.tune.get_context().get_trial_id())
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Ray Train asks the dashboard at this address. Without it, Ray Train picks none of several clusters on a
        # machine.
        env = {**_DRIVER_ENV, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        options = {"num_cpus": 0, "scheduling_strategy": here, "runtime_env": {"env_vars": env}}
        driver: Any = ray.remote(TrialDriver).options(**options).remote(settings)
        try:
            last = _watched(driver, point, directory, settings.metric)
        except RayActorError as error:
            # Tune would take this error for the death of its own process, and not record that the trial failed.
            raise TrainingError(f"a process of the trial died: {' '.join(str(error).split())[:_SHOWN]}") from None
        except KitharaRayError as error:
            if isinstance(error, (ClusterError, TrainingError)) and not isinstance(error, DivergedError):
                raise
            worst = float("inf") if settings.mode == "min" else float("-inf")
            last = {settings.metric: worst, REFUSED: redact(f"{type(error).__name__}: {error}")}
        finally:
            ray.kill(driver)
        ray.tune.report(last)

    # Runs beside the driver of a submitted job, on a node that may have no free CPU.
    return ray.tune.with_resources(trial, ray.tune.PlacementGroupFactory([{ray_compat.HEAD_NODE_RESOURCE: _SLIVER}]))


def _watched(driver: ActorHandle, point: Mapping[str, Any], directory: str, metric: str) -> dict[str, Any]:
    """Drive a trial to its end, with reports to Tune on the way; return its last report."""
    coordinator = remote_get(driver.prepare.remote(point, directory))
    running = driver.train.remote()
    reports, seen = Reports(metric), 0
    while not ray.wait([running], timeout=_POLL_S)[0]:
        try:
            events = ray.get(coordinator.events.remote(seen), timeout=10)
        except RayError:
            continue
        seen += len(events)
        for report in reports.of(events):
            ray.tune.report(report)
    return remote_get(running)
