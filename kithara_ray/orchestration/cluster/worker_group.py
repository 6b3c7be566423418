"""A group with one worker per host, and its request to Ray: the same for training and for decoding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.train import Result, RunConfig, ScalingConfig

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.orchestration.cluster import capacity, jax_trainer, ray_compat, ray_train_compat
from kithara_ray.orchestration.cluster.process_setup import WorkerBackend
from kithara_ray.orchestration.cluster.run_name import check_run_name
from kithara_ray.storage.urls import absolute


@dataclass(frozen=True)
class WorkerGroup:
    """A group of workers before it is started.

    Attributes:
        scaling_config: Ray's ScalingConfig, with one worker per host.
        run_config: Ray's RunConfig: name, storage_path, failure_config, worker_runtime_env.
        cpu_devices_per_worker: number of CPU devices in each worker when there is no accelerator.
        cluster_timeout_s: seconds to wait until the cluster has the resources of scaling_config, and has them free.
    """

    scaling_config: ScalingConfig
    run_config: RunConfig
    cpu_devices_per_worker: int
    cluster_timeout_s: float

    def __post_init__(self):
        workers = self.scaling_config.num_workers
        if not isinstance(workers, int) or workers < 1:
            raise UnsupportedError(
                f"ScalingConfig(num_workers={workers!r}): a fixed number of workers >= 1 is needed; the "
                "group's size decides the global batch"
            )
        if self.scaling_config.use_gpu:
            raise UnsupportedError("ScalingConfig(use_gpu=True): training runs on TPUs, or on CPUs for experiments")
        devices = self.cpu_devices_per_worker
        if not isinstance(devices, int) or devices < 1:
            raise ConfigError(f"cpu_devices_per_worker must be an integer >= 1, got {devices!r}")
        check_run_name(self.run_config.name)

    @property
    def num_workers(self) -> int:
        return capacity.workers_of(self.scaling_config)

    @property
    def platform(self) -> str:
        """The platform that JAX must run on. JAX_PLATFORMS in the run's environment counts as the request."""
        return self.env()["JAX_PLATFORMS"].split(",")[0]

    @property
    def name(self) -> str:
        """The run's name, which Ray makes up if the user gave none."""
        assert self.run_config.name is not None
        return self.run_config.name

    @property
    def storage(self) -> str:
        """The storage path, under which the run's directory is made."""
        return absolute(str(self.run_config.storage_path))

    def env(self) -> dict[str, str]:
        """Return the workers' environment: this library's defaults, overridden by the run's own variables."""
        # JAX_PLATFORMS is always set: workers of a local cluster inherit the driver's value, which may exclude the TPU.
        env = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "tpu" if self.scaling_config.use_tpu else "cpu"}
        if not self.scaling_config.use_tpu:
            env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={self.cpu_devices_per_worker}"
        runtime_env: Any = self.run_config.worker_runtime_env or {}
        return env | dict(runtime_env.get("env_vars", {}))

    def wait(self) -> None:
        """Wait until the cluster has the resources of the group. Raises ClusterError."""
        capacity.wait_for_cluster(
            self.num_workers,
            ray_compat.resources_per_worker(self.scaling_config),
            self.cluster_timeout_s,
            capacity.slice_heads(self.scaling_config),
        )

    def begin(self) -> None:
        """Start, without waiting for it, what Ray's controller of any group would wait for before it starts workers."""
        ray_train_compat.start_autoscaling_coordinator()

    def run(
        self, loop: Callable[[dict], Any], config: dict[str, Any], coordinator: Any = None, heartbeat_s: float = 120.0
    ) -> Result:
        """Run `loop(config)` in every worker, to its end.

        Args:
            coordinator: receives the request to stop when the driver is interrupted. With None, an interrupt ends the
                run.
            heartbeat_s: seconds without a sign of life from a process, after which JAX ends its peers.

        Raises:
            KitharaRayError: a worker failed; the error names the cause.
        """
        runtime_env = dict(self.run_config.worker_runtime_env or {})
        runtime_env["env_vars"] = self.env()
        trainer = jax_trainer.InterruptibleTrainer(
            loop,
            train_loop_config=config,
            jax_config=WorkerBackend(prepare=getattr(loop, "prepare", None), heartbeat_timeout_s=int(heartbeat_s)),
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
