"""The private names of Ray Train: the part of `ray_compat` that imports Ray Train.

Two classes turn private hooks of Ray Train into public methods; `jax_trainer` implements a run's behaviour in them.
"""

import signal
from collections.abc import Callable
from typing import Any

from ray.actor import ActorHandle
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.jax import JaxTrainer
from ray.train.v2.jax.config import _JaxBackend as JaxBackend

__all__ = ["HookedJaxTrainer", "JaxBackend", "error_of_worker", "preemption_notice", "start_autoscaling_coordinator"]

# Ray's `JaxBackend` is needed as a base class: `JaxConfig` is public, but the backend it starts on the workers is not.


class HookedJaxTrainer(JaxTrainer):
    """Ray's JaxTrainer without two of its actors, and with a hook for interrupts."""

    def on_sigint(self, controller: ActorHandle) -> None:
        """Handle one SIGINT of the driver, in a signal handler."""
        raise NotImplementedError

    def _create_default_callbacks(self) -> list[Any]:
        """Return Ray's callbacks without those that start an actor which nothing here needs.

        Workers share no datasets: each reads its own rows. `placement_groups` frees what a dead controller held.
        Needed because `RunConfig(callbacks=...)` adds callbacks and removes none.
        """
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, unused)]

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        """Hand SIGINT to `on_sigint`.

        Needed because Ray's own handler aborts at the first signal and loses all training since the last save.
        """
        on_interrupt: Callable = lambda signum, frame: self.on_sigint(controller)  # noqa: E731
        signal.signal(signal.SIGINT, on_interrupt)


def start_autoscaling_coordinator() -> None:
    """Start Ray's AutoscalingCoordinator on this node if the cluster has none; do not wait for it.

    Needed because the controller of a cluster's first run starts this actor before its workers and waits for its
    process, which imports Ray Data. Started earlier, it is ready by then.
    """
    get_or_create_autoscaling_coordinator()


def preemption_notice() -> Any:
    """Return Ray's notice to this worker about nodes of the run that will go; None if there is none.

    Needed because `ray.train.get_preemption_info()` is a barrier of all ranks, through an actor; the notice that this
    process has is enough.
    """
    return get_train_context().preemption_context.preemption_info


def error_of_worker(failure: BaseException) -> BaseException:
    """Return the exception that a worker raised, out of Ray Train's wrapper.

    Needed to name the cause of a failed run; the wrapper's text is a whole traceback.
    """
    return getattr(failure, "_base_exc", failure)
