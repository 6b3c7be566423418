"""Run a run's callbacks on rank 0, in order, and handle their errors."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray.util.metrics import Gauge

from kithara_ray.callbacks import Callback, RunInfo
from kithara_ray.errors import ConfigError
from kithara_ray.orchestration.cluster.remote import pickled
from kithara_ray.orchestration.worker.votes import FAILED, GO_ON, STOP

logger = logging.getLogger(__name__)


def checked(callbacks: Any) -> tuple[Callback, ...]:
    """Return the callbacks in a form that can be sent to a worker.

    Raises:
        ConfigError: one is no Callback, or cannot be pickled; the message names it.
    """
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Sequence):
        raise ConfigError(f"Trainer: callbacks must be a list, got {type(callbacks).__name__}")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(f"Trainer: callbacks must be kithara_ray.Callback objects, got {callback!r}")
        try:
            pickled(callback)
        except Exception as error:
            raise ConfigError(
                f"Trainer: callback {name_of(callback)} runs in a worker and cannot be pickled ({error}); open files, "
                "connections and locks in on_start"
            ) from error
    return tuple(callbacks)


def name_of(callback: Callback) -> str:
    return type(callback).__name__


class Calls:
    """Rank 0's callbacks; other ranks have none.

    Attributes:
        info: the run's description for the callbacks; None before `start`.
        problem: the error of a required callback, with its name and the step.

    Args:
        on_drop: called with the same text for a callback that failed and that the run goes on without.
    """

    def __init__(self, callbacks: Sequence[Callback], on_drop: Callable[[str], None] = lambda problem: None):
        self._callbacks, self._on_drop = list(callbacks), on_drop
        self.info: RunInfo | None = None
        self.problem: str | None = None
        self._checkpoint: str | None = None

    @property
    def vote(self) -> int:
        """Return the callbacks' vote on what all ranks do next."""
        if self.problem is not None:
            return FAILED
        return STOP if self.info is not None and self.info.is_asked_to_stop else GO_ON

    def start(self, info: RunInfo) -> str:
        """Call `on_start` of the callbacks; return the error of one of them, or nothing."""
        self.info = info
        self._tell("on_start", info.step)
        return self.problem or ""

    def step(self, number: int, metrics: dict[str, Any]) -> None:
        self._tell("on_step", number, number, dict(metrics))

    def evaluation(self, number: int, metrics: dict[str, Any]) -> None:
        self._tell("on_eval", number, number, dict(metrics))

    def checkpoint(self, number: int, path: str) -> None:
        # The last step's checkpoint may be committed a second time, as the end of the run.
        if path != self._checkpoint:
            self._checkpoint = path
            self._tell("on_checkpoint", number, number, path)

    def end(self, number: int, outcome: str, error: str | None = None) -> None:
        """Make the last call to the callbacks."""
        if self.info is not None:
            self._tell("on_end", number, outcome, error)
        self._callbacks = []

    def _tell(self, method: str, number: int, *arguments: Any) -> None:
        for callback in list(self._callbacks):
            try:
                getattr(callback, method)(self.info, *arguments)
            except Exception as error:
                self._callbacks.remove(callback)
                problem = f"callback {name_of(callback)}.{method} at step {number}: {type(error).__name__}: {error}"
                logger.warning("%s", problem, exc_info=True)
                if callback.required or method == "on_start":
                    self.problem = self.problem or problem
                else:
                    self._on_drop(problem)


_GAUGES = {
    "step": "Steps.",
    "loss": "Loss of the last logged step.",
    "eval_loss": "Loss of the last evaluation.",
    "learning_rate": "Learning rate.",
    "tokens_per_s": "Real tokens a second, all hosts.",
    "step_time_s": "Seconds a step.",
    "input_wait_s": "Seconds a step that rank 0 waited for data.",
    "mfu": "Model FLOPs' share of the chips' peak.",
    "hbm_bytes": "Memory of rank 0's fullest device, peak.",
}


class RayMetrics(Callback):
    """Gauges of the last logged step, on Ray's dashboard and its Prometheus endpoints: ray_kithara_ray_loss, ..."""

    required = False

    def on_start(self, run: RunInfo) -> None:
        self._gauges = {
            name: Gauge(f"kithara_ray_{name}", description=text, tag_keys=("run",)) for name, text in _GAUGES.items()
        }

    def on_step(self, run: RunInfo, step: int, metrics: Any) -> None:
        self._set(run, {**metrics, "step": step})

    def on_eval(self, run: RunInfo, step: int, metrics: Any) -> None:
        self._set(run, metrics)

    def _set(self, run: RunInfo, metrics: Any) -> None:
        for name, gauge in self._gauges.items():
            if name in metrics:
                gauge.set(float(metrics[name]), tags={"run": run.name})
