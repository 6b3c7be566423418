"""run.json: the description of a run, complete enough to repeat it, and without secrets.

It is in the run's directory from the start (status "running") to the end ("finished" or "failed"). Every export gets a
copy.
"""

import copy
import dataclasses
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from kithara_ray.checkpoint.run_files import RUN
from kithara_ray.orchestration.data.datasets import Dataloader
from kithara_ray.orchestration.preflight import node_facts
from kithara_ray.orchestration.preflight.tasks import base_facts
from kithara_ray.orchestration.request.facts import mesh_axes
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.orchestration.worker.spec import RunSpec
from kithara_ray.redact import HIDDEN, redact, secret_values

logger = logging.getLogger(__name__)

VERSION = 1
GIT_VARIABLE = "KITHARA_RAY_GIT"  # holds the result of `git_revision` on the machine that submitted the job
# Environment variables whose values affect the computation; of all others only the names are written.
_COMPUTES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "KERAS_", "OMP_", "NCCL_")


class RunManifest:
    """One run's manifest, filled during the run.

    Args:
        request: the request that the run carries out. Tasks gather the slow facts; the first write waits for them.
    """

    def __init__(self, request: RunRequest):
        self._request = request
        env = (request.group.run_config.worker_runtime_env or {}).get("env_vars", {})
        # A value that only the workers receive is also a secret, if its name suggests so.
        self._secrets = sorted({*secret_values(), *secret_values(env)}, key=len, reverse=True)
        self._base = base_facts.remote(request.model.preset_handle)
        self.content: dict[str, Any] = {
            "manifest_version": VERSION,
            "status": "running",
            "started": _now(),
            "versions": node_facts.versions(),
            "platform": platform.platform(),
            "git": git_revision(Path.cwd()),
            "seeds": {"factors": request.step.seed, "shuffle": request.train.seed},
            "environment": environment(request.group.env()),
            "config": _without_environment(request.config),
            "settings": settings(request),
        }

    @property
    def directory(self) -> str | None:
        """The run's directory on the head node, or a URL; None if only Ray's own file system reaches it."""
        return None if self._request.group.run_config.storage_filesystem else self._request.directory

    def settle(self, request: RunRequest) -> None:
        """Take over the settings of a request whose open ones have been chosen."""
        self.content["settings"] = settings(request)

    def begin(self, coordinator: ActorHandle, request: RunRequest, spec: RunSpec, tokenizer: Mapping[str, Any]) -> None:
        """Write the manifest before the first step.

        Args:
            request: the run's request after the checks, which have chosen its mesh.
            spec: the run's RunSpec, with its tokenised datasets.
            tokenizer: see `kept_tokenizer.keep`.
        """
        self.content["base"] = _of_task(self._base)
        self.content["tokenizer"] = tokenizer
        self.content["data"] = {"train": _data(spec.train.store)} | (
            {"eval": _data(spec.eval.data.store)} if spec.eval else {}
        )
        axes, devices = mesh_axes(request) or {}, spec.num_devices
        if spec.plan is not None:
            self.content["plan"] = spec.plan
        where = {"platform": spec.platform, "devices": devices, "hosts": spec.num_workers}
        self.content["mesh"] = {**axes, **where, "by_default": request.default_mesh}
        self._write(coordinator)

    def end(self, coordinator: ActorHandle, status: str, **more: Any) -> dict[str, Any]:
        """Write the manifest of a run that has ended, "finished" or "failed"; return the written content."""
        self.content |= {"status": status, "ended": _now(), **more}
        return self._write(coordinator)

    def write_report(self, coordinator: ActorHandle, history: Mapping[str, Any]) -> None:
        """Write report.html beside run.json. A failure is logged, and never ends a run."""
        if self.directory is None:
            return
        content = redact(json.loads(json.dumps(history, default=str)), self._secrets)
        try:
            logger.info("report: %s", ray.get(coordinator.write_report.remote(self.directory, content), timeout=120))
        except Exception as error:
            logger.warning("the report of the run in %s was not written: %s", self.directory, error)

    def told(self) -> dict[str, Any]:
        """Return the manifest as plain data, without secrets."""
        return redact(json.loads(json.dumps(self.content, default=str)), self._secrets)

    def _write(self, coordinator: ActorHandle) -> dict[str, Any]:
        content = self.told()
        if self.directory is not None:
            try:
                ray.get(coordinator.write_run.remote(self.directory, content), timeout=60)
            except (RayError, OSError) as error:  # a missing description must not end the run
                logger.warning("%s in %s was not written: %s", RUN, self.directory, error)
        return content


def _data(store: Any) -> dict[str, Any]:
    if not hasattr(store, "lengths"):
        return {"rows": "an endless stream", "fingerprint": store.content}
    return {
        "rows": store.num_rows,
        "tokens": int(store.lengths.sum()),
        "trained_tokens": int(store.trained.sum()),
        "lengths": _quantiles(store.lengths),
        "fingerprint": store.content,
    }


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Return quantiles of the rows' token counts."""
    if not len(lengths):
        return {}
    found = np.quantile(lengths, (0, 0.5, 0.95, 1), method="nearest")
    return dict(zip(("min", "median", "p95", "max"), map(int, found), strict=True))


def _of_task(reference: ray.ObjectRef) -> dict[str, Any]:
    """Return a task's facts, or the error as an "unknown" entry: a missing fact must not end a run."""
    try:
        return ray.get(reference, timeout=120)
    except RayError as error:
        return {"unknown": str(getattr(error, "cause", None) or error).strip().splitlines()[-1]}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _without_environment(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a configuration with its workers' variables masked as `environment` masks them."""
    config = copy.deepcopy(dict(config)) if config is not None else None
    runtime_env = ((config or {}).get("run_config") or {}).get("worker_runtime_env") or {}
    if isinstance(runtime_env.get("env_vars"), dict):
        runtime_env["env_vars"] = environment(runtime_env["env_vars"])
    return config


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the workers' variables: the value if it affects the computation, *** for all others."""
    return {name: value if name.startswith(_COMPUTES) else HIDDEN for name, value in sorted(env.items())}


def git_revision(directory: Path) -> dict[str, Any] | None:
    """Return {"revision", "dirty"} of the work tree that holds `directory`; None without a work tree or git."""

    def git(*arguments: str) -> str:
        env = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            ["git", *arguments], cwd=directory, env=env, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if GIT_VARIABLE in os.environ:
            return json.loads(os.environ[GIT_VARIABLE])
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def settings(request: RunRequest) -> dict[str, Any]:
    """Return the handles' settings as JSON-like data, objects by their names; also for a run written in Python."""
    model, step, group, reporting = request.model, request.step, request.group, request.reporting
    kind, optimizer = step.optimizer
    when = request.evaluation
    return {
        "model": {
            "preset_handle": model.preset_handle,
            "precision": model.precision,
            "quantize": model.quantize,
            "lora": _plain(model.lora),
            "starts_from_adapter": model.starts_from_adapter,
        },
        "train_dataloader": _loader(request.train),
        "eval_dataloader": _loader(when.loader) if when else None,
        "optimizer": optimizer if kind == "keras" else _name(optimizer),
        "trainer": {
            "steps": request.steps,
            "epochs": request.epochs,
            "log_steps_interval": reporting.log_steps_interval,
            "eval_steps_interval": when and when.every_steps,
            "eval_epochs_interval": when and when.every_epochs,
            "max_eval_samples": when and when.max_samples,
            "remat": step.remat,
            "gradient_accumulation_steps": step.micro_batches,
            "seed": step.seed,
            "on_nan": step.on_nan,
            "router_aux_loss_coef": step.router_aux_loss_coef,
            "export_every_steps": request.snapshots and request.snapshots.every,
            "export_dir": request.snapshots and request.snapshots.directory,
            "cpu_devices_per_worker": group.cpu_devices_per_worker,
            "cluster_timeout_s": group.cluster_timeout_s,
            "mesh": _plain(step.mesh),
            "checkpointer": _plain(request.checkpointer),
            "tensorboard_dir": reporting.tensorboard_dir,
            "profiler": _plain(reporting.profiler),
            "callbacks": [type(callback).__name__ for callback in reporting.callbacks],
        },
        "scaling_config": _plain(group.scaling_config),
        "run_config": {
            "name": group.run_config.name,
            "storage_path": str(group.run_config.storage_path),
            "failure_config": _plain(group.run_config.failure_config),
        },
    }


def _loader(loader: Dataloader) -> dict[str, Any]:
    inner = {name: _value(value) for name, value in vars(loader).items() if name != "dataset"}
    return {"dataset": _dataset(loader.dataset), **inner}


def _dataset(dataset: Any) -> dict[str, Any]:
    values = {name: _value(value) for name, value in vars(dataset).items() if not name.startswith("_")}
    if hasattr(dataset, "datasets"):  # a mixture
        values["datasets"] = [_dataset(part) for part in dataset.datasets]
    return {"type": type(dataset).__name__, **values}


def _plain(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return _value(value)
    return {field.name: _value(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _value(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _value(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)) and all(isinstance(inner, (bool, int, float, str)) for inner in value):
        return list(value)
    return _name(value)


def _name(value: Any) -> str:
    """Name an object without its content, so that rows of a dataset are not written down."""
    name = getattr(value, "__qualname__", None) or getattr(value, "name_or_path", None)
    return f"{type(value).__name__} {name}" if name else f"{type(value).__name__}"
