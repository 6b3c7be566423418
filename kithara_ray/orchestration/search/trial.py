"""One trial of a search: a whole run, driven by an actor of its own and watched by a trainable of Ray Tune.

Tune puts all that a trial starts into the trial's placement group, where tokenising, reading and a run's other tasks
would wait for ever: it has room for the trainable alone. So the trainable holds a sliver of the head node, no CPU, and
the run is driven by an actor outside the group, as a script would drive it. Ray ends what an actor has started when the
actor is gone, so a trial that is stopped or killed leaves nothing behind.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune
from ray.train import ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kithara_ray.checkpoint.checkpointer import Checkpointer
from kithara_ray.checkpoint.run_files import CHECKPOINTS
from kithara_ray.errors import ClusterError, ConfigError, DivergedError, KitharaRayError, TrainingError
from kithara_ray.orchestration.cluster import ray_compat
from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.orchestration.search.spaces import plain
from kithara_ray.orchestration.trainer import Trainer
from kithara_ray.redact import redact
from kithara_ray.storage.urls import join

RUN = "run"  # the run's directory in the trial's
FINISHED, REFUSED = "finished", "refused"  # keys of a trial's last report, with path and reason
_POLL_S = 1.0
_SLIVER = 0.001
_SHOWN = 200  # characters of what Ray says of a process that died
_TURN_S = 30 * 24 * 3600.0  # for its turn a trial waits; that the cluster can hold one at all is known before the first
# The driver computes nothing, and must not take an accelerator from the workers of its host.
_DRIVER_ENV = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a search share.

    Attributes:
        make: a point of the space -> its Trainer, by cloudpickle: a trial's process says what it lacks to load it.
        directory: the search's.
        metric, mode: what trials are compared by; "min" or "max".
        workers: what each trial asks the cluster for, as `workers_of` tells it.
        cwd: where relative paths begin.
    """

    make: bytes
    directory: str
    metric: str
    mode: str
    workers: tuple
    cwd: str


def workers_of(scaling: ScalingConfig) -> tuple:
    """What a run asks the cluster for; alike for trials that take equal room."""
    needs = tuple(sorted(ray_compat.resources_per_worker(scaling).items()))
    return scaling.num_workers, needs, scaling.topology, scaling.accelerator_type


def trial_directory(search: str, trial_id: str) -> str:
    """The run's directory of a trial."""
    return join(search, trial_id, RUN)


def placed(request: RunRequest, directory: str, metric: str, mode: str) -> RunRequest:
    """The request with everything that it writes put below its trial's directory; it waits for its turn.

    Args:
        directory: of the run, as of `trial_directory`.
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
    """The trial's; by default each evaluation is saved, so that a killed trial goes on from what it last reported."""
    if given is not None:
        return dataclasses.replace(given, checkpoint_dir=directory)
    score = metric if metric.startswith("eval_") else None
    return Checkpointer(directory, max_to_keep=2, score_attribute=score, score_order=mode)


class TrialDriver:
    """The process that does for a trial what a script does for a run."""

    def __init__(self, settings: TrialSettings):
        self._settings = settings
        # Relative paths mean what they mean to the search's own process, where its directory is here too.
        with contextlib.suppress(OSError):
            os.chdir(settings.cwd)

    def prepare(self, point: Mapping[str, Any], directory: str) -> ray.actor.ActorHandle:
        """Make the Trainer; returns the run's coordinator. Raises what the Trainer's parts refuse."""
        settings = self._settings
        try:
            make = ray.cloudpickle.loads(settings.make)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the trainer_factory cannot be loaded in a trial's process: {error}; define what it uses in the "
                "script itself, or install it on the head node"
            ) from error
        self._trainer = self._placed(make(plain(point)), directory)
        return self._trainer.model.coordinator()

    def _placed(self, trainer: Trainer, directory: str) -> Trainer:
        """The Trainer below its trial's directory, without the actors of the process that it comes from."""
        workers = workers_of(trainer.request.group.scaling_config)
        if workers != self._settings.workers:
            raise ConfigError(
                f"this trial asks for other workers than the search has room for: {workers}, not "
                f"{self._settings.workers}; give all trials one scaling_config"
            )
        trainer.adopt(placed(trainer.request, directory, self._settings.metric, self._settings.mode))
        trainer.model.detach()
        return trainer

    def train(self) -> dict[str, Any]:
        """Run to the end; the trial's last report."""
        trainer, metric = self._trainer, self._settings.metric
        result = trainer.train()
        if metric not in result.metrics:
            raise ConfigError(f"metric={metric!r} is not logged; there are {', '.join(sorted(result.metrics))}")
        weights = {"weights": trainer.model.trained} if trainer.model.lora is None else {}
        return {**result.metrics, FINISHED: result.path, "stopped": result.stopped, **weights}


class Reports:
    """A run's events as reports to Tune: what is known when the metric is, but for the end of the run.

    The last report is made when all has been written, so that a scheduler that stops a trial for it stops nothing.
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
    """What Tune runs once a trial. What cannot get better by trying again is reported as the worst metric there is."""

    def trial(point: dict[str, Any]) -> None:
        directory = trial_directory(settings.directory, ray.tune.get_context().get_trial_id())
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # The address is for what Ray Train asks its dashboard: of several clusters on a machine it would take none.
        env = {**_DRIVER_ENV, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        options = {"num_cpus": 0, "scheduling_strategy": here, "runtime_env": {"env_vars": env}}
        driver = ray.remote(TrialDriver).options(**options).remote(settings)
        try:
            last = _watched(driver, point, directory, settings.metric)
        except ray.exceptions.RayActorError as error:
            # Tune would take it for the death of this process, and not write down that the trial has failed.
            raise TrainingError(f"a process of the trial died: {' '.join(str(error).split())[:_SHOWN]}") from None
        except KitharaRayError as error:
            if isinstance(error, (ClusterError, TrainingError)) and not isinstance(error, DivergedError):
                raise
            worst = float("inf") if settings.mode == "min" else float("-inf")
            last = {settings.metric: worst, REFUSED: redact(f"{type(error).__name__}: {error}")}
        finally:
            ray.kill(driver)
        ray.tune.report(last)

    # Beside the driver of a submitted job, on a node that may have no CPU to give.
    return ray.tune.with_resources(trial, ray.tune.PlacementGroupFactory([{ray_compat.HEAD_NODE_RESOURCE: _SLIVER}]))


def _watched(driver: ray.actor.ActorHandle, point: Mapping[str, Any], directory: str, metric: str) -> dict[str, Any]:
    """Drive a trial to its end and report on the way; its last report."""
    coordinator = remote_get(driver.prepare.remote(point, directory))
    running = driver.train.remote()
    reports, seen = Reports(metric), 0
    while not ray.wait([running], timeout=_POLL_S)[0]:
        try:
            events = ray.get(coordinator.events.remote(seen), timeout=10)
        except ray.exceptions.RayError:
            continue
        seen += len(events)
        for report in reports.of(events):
            ray.tune.report(report)
    return remote_get(running)
