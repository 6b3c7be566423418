"""Set up a worker's process before the training loop: Ray's JAX backend with this library's time limits and signals.
It also reports to the loop that its process must leave.

Ray passes no time limits to `jax.distributed.initialize`. A process that waits in a collective for a dead peer would
then wait for JAX's default time; this module sets the limits.
"""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.v2.jax.config import JaxConfig

from kithara_ray.errors import ClusterError
from kithara_ray.orchestration.cluster.ray_train_compat import JaxBackend, preemption_notice

# Set by SIGTERM, which a preempted machine receives some seconds before its end.
terminated = threading.Event()


@dataclass
class WorkerBackend(JaxConfig):
    """Ray's JaxConfig with time limits.

    Attributes:
        prepare: called in each worker's process in a thread, while the processes meet; its errors are not reported.
        initialize_timeout_s: seconds until all processes must have met.
        heartbeat_timeout_s: seconds without a sign of life from a process, after which JAX ends the others.
    """

    # Ray's switch for jax.distributed, also on CPUs. Without it N workers are N independent runs.
    use_tpu: bool = True
    prepare: Callable[[], Any] | None = None
    initialize_timeout_s: int = 300
    heartbeat_timeout_s: int = 100

    @property
    def backend_cls(self):
        return _Backend


class _Backend(JaxBackend):
    def on_start(self, worker_group, backend_config: WorkerBackend):
        limits = (backend_config.initialize_timeout_s, backend_config.heartbeat_timeout_s)
        calls: list[Any] = worker_group.execute_async(_set_up_process, *limits, backend_config.prepare)
        ray.get(calls)
        super().on_start(worker_group, backend_config)
        # This comes after JAX's start, as JAX may have taken the signal for a service of its own.
        calls = worker_group.execute_async(_listen)
        ray.get(calls)

    def on_shutdown(self, worker_group, backend_config: WorkerBackend):
        """Skip Ray's wait for JAX's shutdown, 30 s if a process is dead: a loop that ends well does it itself."""


def _set_up_process(initialize_timeout_s: int, heartbeat_timeout_s: int, prepare: Callable[[], Any] | None) -> None:
    import jax

    if prepare is not None:
        threading.Thread(target=_prepared, args=(prepare,), name="prepare", daemon=True).start()

    # JAX's preemption service would handle SIGTERM itself, and report it to nobody here.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=initialize_timeout_s,
        heartbeat_timeout_seconds=heartbeat_timeout_s,
    )


def _prepared(prepare: Callable[[], Any]) -> None:
    with contextlib.suppress(Exception):  # the loop meets the same error, and raises it
        prepare()


def _listen() -> None:
    """Install the signal handler in the worker's main thread. Only that thread may; the loop runs in another thread."""
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(signum, frame) -> None:
    """Take the first signal as a notice, on which the loop saves and leaves. The second ends the process."""
    if terminated.is_set():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    terminated.set()


def is_draining() -> bool:
    """Return True if Ray has announced that the node of one of the ranks will go."""
    return preemption_notice() is not None


def check_process_group(num_workers: int, platform: str, num_devices: int | None = None) -> None:
    """Check in a worker that all processes have met, and that JAX has the requested platform and number of devices.

    Args:
        num_devices: devices of all processes together; None skips the check.

    Raises:
        ClusterError: the processes run independently, or JAX fell back to another platform.
    """
    import jax

    if jax.process_count() != num_workers:
        raise ClusterError(
            f"{num_workers} workers were started and JAX sees {jax.process_count()} process(es): "
            "jax.distributed was not initialised, so each worker would train by itself"
        )
    found = jax.devices()[0].platform
    if found != platform:
        raise ClusterError(
            f"JAX runs on {found!r}, the run asks for {platform!r}; is the accelerator visible and free?"
        )
    if num_devices is not None and jax.device_count() != num_devices:
        raise ClusterError(
            f"JAX sees {jax.device_count()} devices of {platform!r}, the run asks for {num_devices}; are all chips "
            "of a host given to its worker?"
        )
