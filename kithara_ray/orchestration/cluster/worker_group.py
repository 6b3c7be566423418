"""One worker a host: what Ray is asked for, for training and for decoding alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.train import Result, RunConfig, ScalingConfig

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.orchestration.cluster import capacity, jax_trainer, ray_compat
from kithara_ray.orchestration.cluster.process_setup import WorkerBackend
from kithara_ray.orchestration.cluster.run_name import check_run_name
from kithara_ray.storage.urls import absolute


@dataclass(frozen=True)
class WorkerGroup:
    """A group of workers before it is started.

    Attributes:
        scaling_config: Ray's; one worker per host.
        run_config: Ray's: name, storage_path, failure_config, worker_runtime_env.
        cpu_devices_per_worker: without an accelerator, so many CPU devices in each worker.
        cluster_timeout_s: how long to wait for the cluster to have, and to have free, what scaling_config asks for.
    """

    scaling_config: ScalingConfig
    run_config: RunConfig
    cpu_devices_per_worker: int
    cluster_timeout_s: float

    def __post_init__(self):
        if not isinstance(self.num_workers, int) or self.num_workers < 1:
            raise UnsupportedError(
                f"ScalingConfig(num_workers={self.num_workers!r}): a fixed number of workers >= 1 is needed; the "
                "group's size decides the global batch"
            )
        if self.scaling_config.use_gpu:
            raise UnsupportedError(
                "ScalingConfig(use_gpu=True): training runs on TPUs, or on CPUs for trying things out"
            )
        devices = self.cpu_devices_per_worker
        if not isinstance(devices, int) or devices < 1:
            raise ConfigError(f"cpu_devices_per_worker must be an integer >= 1, got {devices!r}")
        check_run_name(self.run_config.name)

    @property
    def num_workers(self) -> int:
        return self.scaling_config.num_workers

    @property
    def platform(self) -> str:
        """What JAX must run on; JAX_PLATFORMS given in the run's environment is what was asked for."""
        return self.env()["JAX_PLATFORMS"].split(",")[0]

    @property
    def storage(self) -> str:
        """Where the run's directory is made."""
        return absolute(str(self.run_config.storage_path))

    def env(self) -> dict[str, str]:
        """The workers' environment: the run's own, over what no accelerator needs."""
        # JAX_PLATFORMS is always given: workers of a local cluster inherit the driver's, which may keep off the TPU.
        env = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "tpu" if self.scaling_config.use_tpu else "cpu"}
        if not self.scaling_config.use_tpu:
            env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={self.cpu_devices_per_worker}"
        runtime_env = self.run_config.worker_runtime_env or {}
        return env | dict(runtime_env.get("env_vars", {}))

    def wait(self) -> None:
        """Until the cluster has what it takes. Raises ClusterError."""
        capacity.wait_for_cluster(
            self.num_workers,
            ray_compat.resources_per_worker(self.scaling_config),
            self.cluster_timeout_s,
            capacity.slice_heads(self.scaling_config),
        )

    def run(
        self, loop: Callable[[dict], Any], config: dict[str, Any], coordinator: Any = None, heartbeat_s: float = 120.0
    ) -> Result:
        """`loop(config)` in every worker, to its end.

        Args:
            coordinator: is asked to stop the run when the driver is interrupted; None: an interrupt ends it at once.
            heartbeat_s: without a sign of life for so long, JAX ends the peers of a process that is gone.

        Raises:
            KitharaRayError: what a worker failed with, by its cause.
        """
        runtime_env = dict(self.run_config.worker_runtime_env or {})
        runtime_env["env_vars"] = self.env()
        trainer = jax_trainer.InterruptibleTrainer(
            loop,
            train_loop_config=config,
            jax_config=WorkerBackend(heartbeat_timeout_s=int(heartbeat_s)),
            scaling_config=self.scaling_config,
            run_config=RunConfig(
                name=self.run_config.name,
                storage_path=self.storage,
                storage_filesystem=self.run_config.storage_filesystem,
                failure_config=self.run_config.failure_config,
                callbacks=self.run_config.callbacks,
                worker_runtime_env=runtime_env,
                logging_config=self.run_config.logging_config,
            ),
        )
        return jax_trainer.fit(trainer, coordinator)
