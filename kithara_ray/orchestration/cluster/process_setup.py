"""How a worker's process is set up before the training loop: Ray's JAX backend, with limits and signals of ours; and
what tells the loop that its process is to go.

Ray passes no time limits to `jax.distributed.initialize`, and a process that waits in a collective for a peer that is
gone waits for as long as JAX thinks right; here that is said.
"""

import functools
import signal
import threading
from dataclasses import dataclass

import ray
from ray.train.v2.jax.config import JaxConfig

from kithara_ray.errors import ClusterError
from kithara_ray.orchestration.cluster.ray_train_compat import JaxBackend, preemption_notice

# Set by SIGTERM: what a machine that is taken away gets some seconds before.
terminated = threading.Event()


@dataclass
class WorkerBackend(JaxConfig):
    """Attributes:
    initialize_timeout_s: until all processes have met.
    heartbeat_timeout_s: after so long without a sign of life from a process, JAX ends the others.
    """

    # Ray's switch for jax.distributed, on CPUs too; without it N workers are N independent runs.
    use_tpu: bool = True
    initialize_timeout_s: int = 300
    heartbeat_timeout_s: int = 100

    @property
    def backend_cls(self):
        return _Backend


class _Backend(JaxBackend):
    def on_start(self, worker_group, backend_config: WorkerBackend):
        limits = (backend_config.initialize_timeout_s, backend_config.heartbeat_timeout_s)
        ray.get(worker_group.execute_async(_set_up_process, *limits))
        super().on_start(worker_group, backend_config)
        # Afterwards: JAX may have taken the signal for a service of its own.
        ray.get(worker_group.execute_async(_listen))

    def on_shutdown(self, worker_group, backend_config: WorkerBackend):
        """Ray waits here for JAX's farewell, 30 s where a process is dead; a loop that ends well says it itself."""


def _set_up_process(initialize_timeout_s: int, heartbeat_timeout_s: int) -> None:
    import jax

    # It would handle SIGTERM by itself, and tell nobody here.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=initialize_timeout_s,
        heartbeat_timeout_seconds=heartbeat_timeout_s,
    )


def _listen() -> None:
    """In the main thread of the worker's process, which alone may handle signals; the loop runs in another."""
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(signum, frame) -> None:
    """The first is a notice: the loop saves and leaves. The second ends the process."""
    if terminated.is_set():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    terminated.set()


def is_draining() -> bool:
    """Whether Ray has been told that the node of one of the ranks will go."""
    return preemption_notice() is not None


def check_process_group(num_workers: int, platform: str, num_devices: int | None = None) -> None:
    """In a worker: all processes have met, and JAX runs on what was asked for, on as many devices (None: unknown).

    Raises:
        ClusterError: independent one-process runs, or a silent fall-back to another platform.
    """
    import jax

    if jax.process_count() != num_workers:
        raise ClusterError(
            f"{num_workers} workers were started and JAX sees {jax.process_count()} process(es): "
            "jax.distributed was not initialised, each worker would train by itself"
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
