"""Check Ray Tune's spaces, searchers and schedulers: they choose a search's points and stop its trials."""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Searcher, SearchGenerator
from ray.tune.search.sample import Domain
from ray.tune.search.variant_generator import generate_variants

from kithara_ray.errors import ConfigError, KitharaRayError, UnsupportedError
from kithara_ray.orchestration.cluster import ray_compat
from kithara_ray.orchestration.trainer import Trainer

# Ways to choose a value, named as Ray Tune's functions.
WAYS = (
    "choice", "grid_search", "uniform", "quniform", "loguniform", "qloguniform", "randint", "qrandint", "lograndint",
    "qlograndint", "randn", "qrandn",
)  # fmt: skip
_OF_A_LIST = ("choice", "grid_search")
_STOPPING = (ASHAScheduler, MedianStoppingRule)
_PAUSING = ("pbt", "pb2", "hyperband", "bohb")
_NO_PAUSES = (
    "it pauses trials or changes their settings on the way: what an adapter was then trained with is in no "
    'configuration, and a run refuses the checkpoint of another with other settings; use "asha", or no scheduler'
)
_TRIED_POINTS = 20
_STEPS_WITHOUT_END = 10**9


# --------------------------------------------------------------------------------------------------------------- space


def domains_of(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return the space in Ray's own terms. Raises ConfigError for a value that is no way to choose."""
    if not space:
        raise ConfigError('search: space is empty; give {"name": {"loguniform": [1e-5, 1e-2]}} or the like')
    return {name: _domain(name, value) for name, value in space.items()}


def _domain(name: str, value: Any) -> Any:
    if isinstance(value, Domain):
        return value
    way, arguments = next(iter(value.items())) if isinstance(value, Mapping) and len(value) == 1 else (None, None)
    if way not in WAYS:
        raise ConfigError(
            f"space {name!r}: {value!r} does not say how a value is chosen; give one of Ray Tune's ways, as "
            f'{{"choice": [8, 16]}} or {{"loguniform": [1e-5, 1e-2]}}; there are {", ".join(WAYS)}'
        )
    if not isinstance(arguments, Sequence) or isinstance(arguments, str) or not arguments:
        raise ConfigError(f"space {name!r}: {way} takes a list, got {arguments!r}")
    try:
        return getattr(ray.tune, way)(*([list(arguments)] if way in _OF_A_LIST else arguments))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"space {name!r}: Ray Tune refuses {way}{list(arguments)}: {error}") from error


def plain(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point without numpy's scalars, which configurations refuse."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in point.items()}


def first_trainer(make: Callable[[dict[str, Any]], Trainer], domains: Mapping[str, Any], seed: int) -> Trainer:
    """Return the Trainer of one point, for the settings that all trials share. Points that make no Trainer are skipped.

    Raises:
        KitharaRayError: none of `_TRIED_POINTS` points makes a Trainer; this is the last one's error.
    """
    refused: KitharaRayError | None = None
    for point in itertools.islice(_variants(domains, seed), _TRIED_POINTS):
        try:
            return make(plain(point))
        except KitharaRayError as error:
            refused = error
    assert refused is not None  # a space has at least one point
    raise refused


def _variants(domains: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    random = np.random.RandomState(seed)
    while True:
        for _, point in generate_variants(dict(domains), random_state=random):
            yield point


def describe(value: Any) -> Any:
    """Return a way to choose values, a searcher or a scheduler as plain data; equal ones give equal data."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): describe(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(inner) for inner in value]
    if isinstance(value, Domain):
        inner = {name: describe(inner) for name, inner in vars(value).items() if name not in ("sampler", "func")}
        sampler = value.get_sampler()
        parts = {name: describe(inner) for name, inner in vars(sampler).items()}
        return {type(value).__name__: inner, type(sampler).__name__: parts}
    return type(value).__name__


# ------------------------------------------------------------------------------------------------------------ searcher


def check_searcher(searcher: str | Searcher, domains: Mapping[str, Any]) -> None:
    """Raise ConfigError for a wrong searcher, and UnsupportedError for one that is not installed."""
    if isinstance(searcher, Searcher):
        return
    if searcher not in ("random", "optuna"):
        raise ConfigError(f'search: searcher must be "random", "optuna" or one of Ray Tune\'s, got {searcher!r}')
    if searcher == "optuna":
        grids = [name for name, value in domains.items() if isinstance(value, Mapping)]
        if grids:
            raise ConfigError(f'search: Optuna tries no grids; give {", ".join(grids)} as {{"choice": [...]}}')
        if importlib.util.find_spec("optuna") is None:
            raise UnsupportedError('search: searcher="optuna" needs Optuna: pip install "kithara-ray[tune]"')


if TYPE_CHECKING:
    _Algorithm = ConcurrencyLimiter
else:
    _Algorithm = object


class _Here(_Algorithm):
    """Keeps this cluster's concurrency when a search resumes, in place of the saved one."""

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state | {"max_concurrent": self.max_concurrent})


class Points(_Here, BasicVariantGenerator):
    """Chooses grid and random points."""


class Limited(_Here, ConcurrencyLimiter):
    """Limits the trials of a searcher that run at once."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        # For the searcher a failed trial is over, so it would warn about every report of the retry.
        if not ray_compat.limits_by_itself(self) or trial_id in self.live_trials:
            super().on_trial_result(trial_id, result)


def points(searcher: str | Searcher, at_once: int, seed: int) -> Any:
    """Return Ray's search algorithm, with at most `at_once` trials in progress."""
    if searcher == "random":
        settings: dict[str, Any] = {"max_concurrent": at_once, "random_state": seed}
        return Points(**settings)
    if searcher == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        searcher = OptunaSearch(seed=seed)
    assert isinstance(searcher, Searcher)  # `check_searcher` refuses other names
    return SearchGenerator(Limited(searcher, max_concurrent=at_once))


# ----------------------------------------------------------------------------------------------------------- scheduler


def check_scheduler(scheduler: str | TrialScheduler | None, reduction_factor: float) -> None:
    """Raise ConfigError for a wrong scheduler, and UnsupportedError for one that does more than stop trials."""
    if isinstance(scheduler, str) and scheduler not in ("asha", *_PAUSING):
        raise ConfigError(f'search: scheduler must be "asha", None or one of Ray Tune\'s, got {scheduler!r}')
    stops = scheduler is None or scheduler == "asha" or type(scheduler) is FIFOScheduler
    stops |= isinstance(scheduler, _STOPPING) and ray_compat.only_stops(scheduler)
    if not stops:
        name = repr(scheduler) if isinstance(scheduler, str) else type(scheduler).__name__
        raise UnsupportedError(f"search: scheduler={name}: {_NO_PAUSES}")
    if not reduction_factor > 1:
        raise ConfigError(f"search: reduction_factor must be > 1, got {reduction_factor!r}")


def scheduler_of(scheduler: str | TrialScheduler | None, grace_steps: int, reduction_factor: float) -> Any:
    """Return Ray's scheduler."""
    if isinstance(scheduler, MedianStoppingRule):
        # With few trials it would pause one as soon as another waits, and start its run again later.
        ray_compat.set_time_slice(scheduler, math.inf)
    if scheduler != "asha":
        return scheduler
    # A trial ends by itself at its last step, so it never reaches the rungs beyond.
    return ASHAScheduler(
        time_attr="step", max_t=_STEPS_WITHOUT_END, grace_period=grace_steps, reduction_factor=reduction_factor
    )


def seen_by(scheduler: Any) -> list[list[dict[str, float]]] | None:
    """Return ASHA's record, trial -> metric, by bracket and rung, which Ray Tune does not save; None for others."""
    if not isinstance(scheduler, ASHAScheduler):
        return None
    return [[dict(recorded) for recorded in rungs] for rungs in ray_compat.rungs_of(scheduler)]


def show_again(scheduler: Any, seen: Sequence[Sequence[Mapping[str, float]]]) -> None:
    """Restore into ASHA the record of an earlier one with the same settings."""
    for own, rungs in zip(ray_compat.rungs_of(scheduler), seen, strict=True):
        for recorded, known in zip(own, rungs, strict=True):
            recorded.update(known)
