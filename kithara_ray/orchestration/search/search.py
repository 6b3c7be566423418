"""A search over the settings of runs, by Ray Tune. Each trial is a full run with its own checkpoints.

Ray Tune chooses points, starts, stops and retries trials and keeps its state. `trial` describes a single trial.
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
import ray.tune
from ray.train import ScalingConfig
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console

from kithara_ray.checkpoint.run_files import read_trained, tokenizer_of
from kithara_ray.errors import ConfigError, TrainingError
from kithara_ray.orchestration.cluster import capacity, placement_groups, ray_compat
from kithara_ray.orchestration.cluster.connection import start_ray
from kithara_ray.orchestration.cluster.jax_trainer import sigint_kept
from kithara_ray.orchestration.cluster.remote import pickled
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.model import KerasHubModel
from kithara_ray.orchestration.search import spaces
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
    """The end of one trial.

    Attributes:
        id: Ray Tune's id, also the name of the trial's directory.
        point: the trial's point in the space.
        state: "finished"; "stopped" by the scheduler; "refused", it cannot be run or has diverged; "failed".
        metrics: the last reported metrics.
        path: the run's directory: `adapter/` (or the trained weights), `checkpoints/`, run.json.
        error: the reason, if the trial was refused or failed.
        weights: location of the trained weights, if the run trains all weights.
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
    """The result of a search.

    Attributes:
        best: the finished trial with the best last metric.
        trials: all trials, in the order of their ids.
        metric, mode: the metric that ranks the trials, and its direction.
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
    """Train a run for each of several points of a space, and keep the best model ready for export.

    If the directory holds the same search already, that search resumes: finished trials stay, the others continue from
    their checkpoints.

    Args:
        trainer_factory: function from a point of the space, {name: value}, to a Trainer. It is called once here, and
            in a process of each trial. The run_config's name and storage_path set the search's directory; the
            Trainer's output goes below it. All trials have one scaling_config.
        space: name -> a way to choose its value: `ray.tune.loguniform(1e-5, 1e-2)`, or the same as data,
            {"loguniform": [1e-5, 1e-2]}; {"choice": [8, 16]}; {"grid_search": [8, 16]}, which tries each value.
        num_samples: number of trials; with a grid, trials of each point of the grid.
        metric: the metric that ranks the trials, by its name in the history, e.g. "eval_loss" or "loss".
        mode: "min" or "max": the better direction of the metric.
        scheduler: "asha" stops a trial early if it is worse than the others were after as many steps. It checks
            whenever the metric is logged. Or one of Ray's schedulers that only stop trials.
        grace_steps, reduction_factor: for "asha": the steps before its first check, and the factor F of its cut: one
            trial in F goes on.
        searcher: "random", "optuna" if it is installed, or one of Ray's searchers.
        max_concurrent_trials: maximum trials at once; never more than the cluster has free workers for. A resumed
            search starts all its unfinished trials first.
        max_failures: retries of a trial whose processes died or failed. Each retry resumes from the checkpoint.
        seed: seed of the choice of points.
        progress: show one line per report.

    Raises:
        ConfigError: an argument is wrong, or the directory holds another search.
        ClusterError: the cluster cannot hold a single trial.
        TrainingError: no trial has finished.
        KeyboardInterrupt: the search was interrupted; the same call resumes it.
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
    at_once = int(min(_room(request.group), max_concurrent_trials or math.inf))
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
    """Run Ray Tune to the end, and wait until no trial holds anything on the cluster. Raises KeyboardInterrupt."""
    again: Any = ray.tune.ResumeConfig.ResumeType.RESUME
    resume = ray.tune.ResumeConfig(errored=again) if goes_on else None
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
        logger.warning("a trial's workers have not ended yet; `ray status` shows what they hold")
    if shown.unfinished or not chosen.is_finished():
        raise KeyboardInterrupt("the search was interrupted; the same call continues it")
    return analysis


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"search: {name} must be an integer >= {least}, got {value!r}")


# -------------------------------------------------------------------------------------------------- cluster, directory


def room_for(scaling: ScalingConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many trials find workers, and whole TPU slices, at once on nodes with these resources."""
    workers = capacity.placeable(10**6, ray_compat.resources_per_worker(scaling), list(nodes))
    rooms = [workers // capacity.workers_of(scaling)]
    for name, count in capacity.slice_heads(scaling).items():
        rooms.append(int(sum(node.get(name, 0) for node in nodes) // count))
    return min(rooms)


def _room(group: WorkerGroup) -> int:
    """Return the room for trials in the free part of the cluster; wait until one fits. Raises ClusterError."""
    group.wait()
    free = ray_compat.free_by_node()
    return max(1, room_for(group.scaling_config, list(free.values())))


def _begin(directory: str, about: dict[str, Any], config: Mapping[str, Any] | None) -> bool:
    """Write search.json; return True if the directory already holds this search, with trials.

    Raises:
        ConfigError: the directory holds another search; the message names the difference.
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
                    "give another run_config name, or the same arguments to continue"
                )
        states = [name for name in files if name.startswith("experiment_state-") and name.endswith(".json")]
        return bool(states) and _has_trials(place.fs.cat_file(place.path(max(states))))
    place.put_bytes(json.dumps(about, indent=2).encode(), "", SEARCH)
    return False


def _has_trials(state: bytes) -> bool:
    """Return True if Ray Tune's saved state has trials. An unreadable state is reported later, when Ray reads it."""
    try:
        return bool(json.loads(state)["trial_data"])
    except (ValueError, KeyError, TypeError):
        return True


# ------------------------------------------------------------------------------------------------------------- results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Tune's tables and tracebacks, for which it has no other switches; errors are in error.txt."""
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
        return pickled(make)
    except Exception as error:  # any error that its captured objects raise
        raise ConfigError(
            f"search: the trainer_factory cannot be sent to the trials ({type(error).__name__}: {error}); make models, "
            "datasets and optimizers inside it"
        ) from error


class _Shown(ray.tune.Callback):
    """Show one line per report, free the groups of dead trials, and count the trials left when the search ended.

    Its state is the scheduler's record of the trials. Tune saves it with the search.

    Args:
        goes_on: True for a resumed search, which must have trials from the beginning.
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
            # Ray Tune logs the reason. It would then start a new search among the files of the old trials.
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
    """Return a trial's last error: from this node while the search runs, else from the saved state."""
    here = trial.pickled_error_file
    error = pickle.loads(Path(here).read_bytes()) if here and os.path.exists(here) else trial.get_pickled_error()
    cause = getattr(error, "cause", None) or error
    return redact(f"{type(cause).__name__}: {' '.join(str(cause).split())}") if cause is not None else "unknown"


def _result(trial: Any, directory: str) -> TrialResult:
    last = dict(trial.last_result or {})
    path = trial_directory(directory, trial.trial_id)
    common: dict[str, Any] = {"id": trial.trial_id, "point": plain(trial.config), "path": path}
    numbers: dict[str, float] = {name: value for name, value in last.items() if isinstance(value, (int, float))}
    if trial.status == "ERROR":
        return TrialResult(**common, state="failed", metrics=numbers, error=_error_of(trial))
    if REFUSED in last:
        return TrialResult(**common, state="refused", metrics=numbers, error=last[REFUSED])
    state = "finished" if FINISHED in last else "stopped"
    return TrialResult(**common, state=state, metrics=numbers, weights=last.get("weights"))


def best_of(trials: Sequence[TrialResult], metric: str, mode: str) -> TrialResult:
    """Return the best of the finished trials. Raises TrainingError if there is none."""
    finished = [trial for trial in trials if trial.state == "finished" and math.isfinite(trial.metrics[metric])]
    if not finished:
        errors = [f"{trial.id} {trial.point}: {trial.error}" for trial in trials if trial.error]
        raise TrainingError(f"none of {len(trials)} trials has finished; {errors[0] if errors else 'all were stopped'}")
    return (min if mode == "min" else max)(finished, key=lambda trial: trial.metrics[metric])


def _trained_model(make: Callable[[dict[str, Any]], Any], best: TrialResult) -> KerasHubModel:
    """Return the best trial's model, with the trained tensors from its run's files."""
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
