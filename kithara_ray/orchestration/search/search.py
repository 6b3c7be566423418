"""A search over the settings of runs, by Ray Tune: each trial is a run of its own, with its own checkpoints.

Ray Tune chooses points, starts, stops and retries trials and keeps its state; see `trial` for what runs in one of them.
"""

import contextlib
import json
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.tune
from ray.train import ScalingConfig
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console

from kithara_ray.checkpoint.run_files import read_trained, tokenizer_of
from kithara_ray.errors import ConfigError, TrainingError
from kithara_ray.orchestration.cluster import capacity, ray_compat
from kithara_ray.orchestration.cluster.connection import start_ray
from kithara_ray.orchestration.cluster.jax_trainer import sigint_kept
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.model import KerasHubModel
from kithara_ray.orchestration.search import placement_groups, spaces
from kithara_ray.orchestration.search.spaces import describe, plain
from kithara_ray.orchestration.search.state_files import whole_files
from kithara_ray.orchestration.search.trial import (
    FINISHED,
    REFUSED,
    TrialSettings,
    trainable,
    trial_directory,
    workers_of,
)
from kithara_ray.redact import redact
from kithara_ray.storage.places import Place
from kithara_ray.storage.urls import is_url

logger = logging.getLogger(__name__)

SEARCH = "search.json"
_LOOK_S = 1.0
_SETTLE_S = 15.0


@dataclass(frozen=True)
class TrialResult:
    """How one trial ended.

    Attributes:
        id: by Ray Tune; the trial's directory is called so.
        point: of the space.
        state: "finished"; "stopped" by the scheduler; "refused", it cannot be run or has diverged; "failed".
        metrics: the last reported.
        path: the run's directory: `adapter/` (or the trained weights), `checkpoints/`, run.json.
        error: why it was refused or has failed.
        weights: of a run that trains all weights, where they are.
    """

    id: str
    point: dict[str, Any]
    state: str
    metrics: dict[str, float]
    path: str
    error: str | None = None
    weights: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """Attributes:
    best: the finished trial with the best last metric.
    trials: all, by their ids.
    metric, mode: what they were compared by.
    path: the search's directory.
    model: the best trial's model, as `Trainer.train` leaves it.
    grid: Ray's own result, with data frames of all reports.
    """

    best: TrialResult
    trials: list[TrialResult]
    metric: str
    mode: str
    path: str
    model: KerasHubModel
    grid: Any = field(repr=False)


def search(
    trainer_factory: Callable[[dict[str, Any]], Any],
    space: Mapping[str, Any],
    *,
    num_samples: int = 1,
    metric: str = "eval_loss",
    mode: str = "min",
    scheduler: str | TrialScheduler | None = None,
    grace_steps: int = 1,
    reduction_factor: float = 4.0,
    searcher: str | Searcher = "random",
    max_concurrent_trials: int | None = None,
    max_failures: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Train a run for each of several points of a space; the best of them is kept ready to be exported.

    A search whose directory holds the same search goes on: trials that have finished stay, the others go on from their
    checkpoints.

    Args:
        trainer_factory: a point of the space, {name: value}, -> a Trainer. It is called here once, and in a process of
            each trial. The run_config's name and storage_path say where the search is kept; what the Trainer writes is
            put below it. All trials have one scaling_config.
        space: name -> how it is chosen: `ray.tune.loguniform(1e-5, 1e-2)`, or the same as data,
            {"loguniform": [1e-5, 1e-2]}; {"choice": [8, 16]}; {"grid_search": [8, 16]}, which tries each value.
        num_samples: trials; of each point of the grid, where there is one.
        metric: what trials are compared by, as the history calls it, e.g. "eval_loss" or "loss".
        mode: "min" or "max", which is better.
        scheduler: "asha" stops trials early that are worse than the others were after as many steps; it looks whenever
            the metric is logged. Or one of Ray's that only stops trials.
        grace_steps, reduction_factor: of "asha": after how many steps it first looks, and which part goes on, 1 of so
            many.
        searcher: "random", "optuna" where it is installed, or one of Ray's.
        max_concurrent_trials: at most so many at once; in any case no more than the cluster has free workers for. A
            search that goes on begins with all trials that are to go on.
        max_failures: how often a trial whose processes died or failed is tried again. It goes on from its checkpoint.
        seed: of the points.
        progress: show a line a report.

    Raises:
        ConfigError: an argument, or the directory holds another search.
        ClusterError: the cluster cannot hold a single trial.
        TrainingError: no trial has finished.
        KeyboardInterrupt: the search was interrupted; the same call goes on with it.
    """
    domains = spaces.domains_of(space)
    _check_count("num_samples", num_samples)
    _check_count("grace_steps", grace_steps)
    _check_count("max_failures", max_failures, least=0)
    if max_concurrent_trials is not None:
        _check_count("max_concurrent_trials", max_concurrent_trials)
    if mode not in ("min", "max"):
        raise ConfigError(f"search: mode must be 'min' or 'max', got {mode!r}")
    spaces.check_searcher(searcher, domains)
    spaces.check_scheduler(scheduler, reduction_factor)
    start_ray()
    request = spaces.first_trainer(trainer_factory, domains, seed).request
    if metric.startswith("eval_") and request.evaluation is None:
        raise ConfigError(
            f"search: metric={metric!r} needs Trainer(eval_dataloader=...) or Dataloader(eval_fraction=...), or give "
            'metric="loss"'
        )
    storage, name = request.group.storage, request.group.run_config.name
    workers = workers_of(request.group.scaling_config)
    settings = TrialSettings(_pickled(trainer_factory), request.directory, metric, mode, workers, os.getcwd())
    about = {"space": {key: describe(value) for key, value in domains.items()}, "metric": metric, "mode": mode}
    about |= {"num_samples": num_samples, "seed": seed, "searcher": describe(searcher)}
    about |= {"scheduler": describe(scheduler), "grace_steps": grace_steps, "reduction_factor": reduction_factor}
    goes_on = _begin(settings.directory, about, getattr(trainer_factory, "config", None))
    at_once = min(_room(request.group), max_concurrent_trials or math.inf)
    logger.info("searching in %s: trials_at_once=%d", settings.directory, at_once)
    files = request.group.run_config.storage_filesystem
    if files is None and not is_url(storage):
        files = whole_files()
    arguments = {"name": name, "storage_path": storage, "storage_filesystem": files}
    arguments |= {"config": domains, "num_samples": num_samples, "metric": metric, "mode": mode}
    stops = spaces.scheduler_of(scheduler, grace_steps, reduction_factor)
    analysis = _run(
        trainable(settings),
        spaces.points(searcher, at_once, seed),
        _Shown(metric, stops, goes_on, Console(stderr=True, quiet=not progress, highlight=False)),
        goes_on,
        scheduler=stops,
        max_failures=max_failures,
        **arguments,
    )
    trials = sorted((_result(trial, settings.directory) for trial in analysis.trials), key=lambda trial: trial.id)
    best = best_of(trials, metric, mode)
    model = _trained_model(trainer_factory, best)
    return SearchResult(best, trials, metric, mode, settings.directory, model, ray.tune.ResultGrid(analysis))


def _run(trial: Any, chosen: Any, shown: "_Shown", goes_on: bool, **arguments: Any) -> Any:
    """Ray Tune, to the end, and until nothing of a trial is left on the cluster. Raises KeyboardInterrupt."""
    resume = ray.tune.ResumeConfig(errored=ray.tune.ResumeConfig.ResumeType.RESUME) if goes_on else None
    before = set(placement_groups.groups())
    with sigint_kept(), _quiet():
        analysis = ray.tune.run(
            trial,
            search_alg=chosen,
            callbacks=[shown],
            resume_config=resume,
            raise_on_failed_trial=False,
            verbose=0,
            trial_name_creator=_id_of,
            trial_dirname_creator=_id_of,
            **arguments,
        )
    if not placement_groups.settle(before, _SETTLE_S):
        logger.warning("workers of a trial have not ended yet; `ray status` shows what they hold")
    if shown.unfinished or not chosen.is_finished():
        raise KeyboardInterrupt("the search was interrupted; the same call goes on with it")
    return analysis


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"search: {name} must be an integer >= {least}, got {value!r}")


# -------------------------------------------------------------------------------------------------- cluster, directory


def room_for(scaling: ScalingConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials find workers, and whole TPU slices, at once on nodes with these resources."""
    workers = capacity.placeable(10**6, ray_compat.resources_per_worker(scaling), list(nodes))
    rooms = [workers // scaling.num_workers]
    for name, count in capacity.slice_heads(scaling).items():
        rooms.append(int(sum(node.get(name, 0) for node in nodes) // count))
    return min(rooms)


def _room(group: WorkerGroup) -> int:
    """Of the cluster, by what is free now; waits for the first trial's as a run does. Raises ClusterError."""
    group.wait()
    free = ray_compat.free_by_node()
    return max(1, room_for(group.scaling_config, list(free.values())))


def _begin(directory: str, about: dict[str, Any], config: Mapping[str, Any] | None) -> bool:
    """Write search.json; whether the directory holds this search already, with trials.

    Raises:
        ConfigError: it holds another one; by what differs.
    """
    about = json.loads(json.dumps({**about, "config": config}, default=str))
    place = Place(directory)
    files = place.files("")
    if SEARCH in files:
        found = json.loads(place.fs.cat_file(place.path(SEARCH)))
        for name, value in about.items():
            if found.get(name) != value:
                raise ConfigError(
                    f"{directory} holds a search with another {name}: it was {found.get(name)!r} and is {value!r}; "
                    "give another run_config name, or the same arguments to go on"
                )
        states = [name for name in files if name.startswith("experiment_state-") and name.endswith(".json")]
        return bool(states) and _has_trials(place.fs.cat_file(place.path(max(states))))
    place.put_bytes(json.dumps(about, indent=2).encode(), "", SEARCH)
    return False


def _has_trials(state: bytes) -> bool:
    """Of what Ray Tune has kept; what cannot be read is told of when Ray has tried."""
    try:
        return bool(json.loads(state)["trial_data"])
    except (ValueError, KeyError, TypeError):
        return True


# ------------------------------------------------------------------------------------------------------------- results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tune without tables and tracebacks of its own, for which it has no other switches; errors are in error.txt."""
    switches = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}
    ours = {name: value for name, value in switches.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _pickled(make: Callable[[dict[str, Any]], Any]) -> bytes:
    try:
        return ray.cloudpickle.dumps(make)
    except Exception as error:  # whatever its captured objects raise
        raise ConfigError(
            f"search: the trainer_factory cannot be sent to the trials ({type(error).__name__}: {error}); make models, "
            "datasets and optimizers inside it"
        ) from error


class _Shown(ray.tune.Callback):
    """A line a report; what dead trials held is freed; and how many trials were left when the search ended.

    Its state, which Tune keeps with the search's, is what the scheduler has seen.

    Args:
        goes_on: there must be trials from the beginning.
    """

    def __init__(self, metric: str, scheduler: Any, goes_on: bool, console: Console):
        self._metric, self._scheduler, self._goes_on, self._console = metric, scheduler, goes_on, console
        self._looked = 0.0
        self.unfinished = 0

    def get_state(self) -> dict[str, Any] | None:
        seen = spaces.seen_by(self._scheduler)
        return None if seen is None else {"seen": seen}

    def set_state(self, state: dict[str, Any]) -> None:
        spaces.show_again(self._scheduler, state["seen"])

    def on_step_begin(self, iteration, trials, **info) -> None:
        if self._goes_on and not trials:
            # Ray Tune says why, and would begin anew beside what the trials have left.
            raise ConfigError(
                "search: the state that Ray Tune had written cannot be read, so the search cannot go on; give another "
                "run_config name. Adapters of trials that finished are in their directories"
            )
        self._goes_on = False

    def on_step_end(self, iteration, trials, **info) -> None:
        self.unfinished = sum(not trial.is_finished() for trial in trials)
        if time.monotonic() - self._looked >= _LOOK_S:
            self._looked = time.monotonic()
            placement_groups.free()

    def on_trial_start(self, iteration, trials, trial, **info) -> None:
        self._say(trial, f"begins with {plain(trial.config)}")

    def on_trial_result(self, iteration, trials, trial, result, **info) -> None:
        if REFUSED in result:
            self._say(trial, f"refused: {result[REFUSED]}")
        else:
            self._say(trial, f"step={result['step']} {self._metric}={result[self._metric]:.4f}")

    def on_trial_recover(self, iteration, trials, trial, **info) -> None:
        self._say(trial, f"is tried again: {_error_of(trial)}")

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        self._say(trial, f"failed: {_error_of(trial)}")

    def _say(self, trial: Any, text: str) -> None:
        self._console.print(f"{trial.trial_id} {text}", soft_wrap=True, markup=False)


def _id_of(trial: Any) -> str:
    return trial.trial_id


def _error_of(trial: Any) -> str:
    """What a trial last failed with: here while the search runs, else where it is kept."""
    here = trial.pickled_error_file
    error = pickle.loads(Path(here).read_bytes()) if here and os.path.exists(here) else trial.get_pickled_error()
    cause = getattr(error, "cause", None) or error
    return redact(f"{type(cause).__name__}: {' '.join(str(cause).split())}") if cause is not None else "unknown"


def _result(trial: Any, directory: str) -> TrialResult:
    last = dict(trial.last_result or {})
    path = trial_directory(directory, trial.trial_id)
    common = {"id": trial.trial_id, "point": plain(trial.config), "path": path}
    numbers = {name: value for name, value in last.items() if isinstance(value, (int, float))}
    if trial.status == "ERROR":
        return TrialResult(**common, state="failed", metrics=numbers, error=_error_of(trial))
    if REFUSED in last:
        return TrialResult(**common, state="refused", metrics=numbers, error=last[REFUSED])
    state = "finished" if FINISHED in last else "stopped"
    return TrialResult(**common, state=state, metrics=numbers, weights=last.get("weights"))


def best_of(trials: Sequence[TrialResult], metric: str, mode: str) -> TrialResult:
    """The best of those that finished. Raises TrainingError where none has."""
    finished = [trial for trial in trials if trial.state == "finished" and math.isfinite(trial.metrics[metric])]
    if not finished:
        errors = [f"{trial.id} {trial.point}: {trial.error}" for trial in trials if trial.error]
        raise TrainingError(f"none of {len(trials)} trials has finished; {errors[0] if errors else 'all were stopped'}")
    return (min if mode == "min" else max)(finished, key=lambda trial: trial.metrics[metric])


def _trained_model(make: Callable[[dict[str, Any]], Any], best: TrialResult) -> KerasHubModel:
    """The best trial's model with what its run has left in files."""
    model = make(best.point).model
    if model.lora is None:
        model.set_trained(best.weights)
        model.run = {"source": best.path}
        model.take_tokenizer(tokenizer_of(best.path))
        return model
    trained = read_trained(best.path)
    model.set_adapter({name: np.asarray(tensor, np.float32) for name, tensor in trained.adapter.tensors.items()})
    model.run = trained.run
    model.take_tokenizer(trained.tokenizer)
    return model
