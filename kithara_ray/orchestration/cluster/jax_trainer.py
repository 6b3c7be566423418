"""Run Ray's JaxTrainer: handle interrupts, and name the cause of a failure.

The first Ctrl-C asks the ranks to save and leave at the same step. The second ends the run at once.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.train import Result
from ray.train.v2.api.exceptions import TrainingFailedError

from kithara_ray.errors import KitharaRayError, TrainingError
from kithara_ray.orchestration.cluster import placement_groups
from kithara_ray.orchestration.cluster.ray_train_compat import HookedJaxTrainer, error_of_worker

logger = logging.getLogger(__name__)


class InterruptibleTrainer(HookedJaxTrainer):
    """A JaxTrainer whose first interrupt stops the run in order.

    Attributes:
        coordinator: receives the request to stop; set before `fit`. With None, an interrupt ends the run at once.
    """

    coordinator: ActorHandle | None
    interrupts = 0

    def on_sigint(self, controller: ActorHandle) -> None:
        self.interrupts += 1
        if self.interrupts == 1 and self.coordinator is not None:
            logger.warning("interrupted: saving after this step, then exiting. Press Ctrl-C again to abort")
            self.coordinator.ask.remote("interrupt")
            return
        with contextlib.suppress(RayActorError):
            ray.get(controller.abort.remote())
        raise KeyboardInterrupt


@contextlib.contextmanager
def sigint_kept() -> Iterator[None]:
    """Restore the handler of Ctrl-C afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def fit(trainer: InterruptibleTrainer, coordinator: ActorHandle | None) -> Result:
    """Run to the end.

    Raises:
        KitharaRayError: the run failed; the error names the cause.
    """
    trainer.coordinator = coordinator
    try:
        with sigint_kept():
            return trainer.fit()
    except TrainingFailedError as error:
        raise named(error, _stalled(coordinator)) from error
    except RayActorError as error:
        placement_groups.free()  # nobody else frees what the controller held
        raise TrainingError(f"Ray's controller of the run died: {_one_line(error)}") from error
    finally:
        if coordinator is not None:
            coordinator.stop_watching.remote()


def _stalled(coordinator: ActorHandle | None) -> str | None:
    """Return why the watchdog ended the last attempt; None if it did not."""
    if coordinator is None:
        return None
    try:
        events = ray.get(coordinator.events.remote(0), timeout=30)
    except RayError:
        return None
    text = None
    for event in events:
        if event["kind"] == "begin":
            text = None
        elif event["kind"] == "stalled":
            text = event["text"]
    return text


def named(error: TrainingFailedError, stalled: str | None = None) -> KitharaRayError:
    """Return the cause of a failed run: the watchdog's verdict, an error of this library, else the rank that failed
    first.

    If one rank dies, the others fail with JAX's errors about it. Such errors are chosen last.
    """
    if stalled is not None:
        return TrainingError(f"no progress, so the run was ended: {stalled}")
    failures = getattr(error, "worker_failures", None) or {}
    for _, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", failure)
        for found in (cause, error_of_worker(failure)):
            if isinstance(found, KitharaRayError):
                return found
    if failures:
        rank, failure = min(sorted(failures.items()), key=lambda pair: _collateral(pair[1]))
        cause = error_of_worker(failure)
        return TrainingError(f"rank {rank} of the worker group failed: {type(cause).__name__}: {cause}")
    return TrainingError(f"the run failed: {error}")


def _collateral(failure: BaseException) -> int:
    """Rate how likely a failure is only the consequence of another rank's failure."""
    cause = error_of_worker(failure)
    if type(cause).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        return 2
    return int(isinstance(cause, RayActorError))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
