"""Report to trackers through their own libraries, which only the worker imports and needs.

The libraries read credentials from the workers' environment (WANDB_API_KEY, MLFLOW_TRACKING_TOKEN ...). So no
credential is an argument, and none is written down.
"""

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from kithara_ray.callbacks.callback import Callback, RunInfo
from kithara_ray.errors import ConfigError

_LONGEST_VALUE = 500


class WandB(Callback):
    """A callback for Weights & Biases.

    A resumed run continues the same run there: its id derives from the run's directory.

    Args:
        project, entity, name: as in `wandb.init`; the default name is the run's.
        mode: "online", "offline" or "disabled".
        directory: the library's directory on rank 0's host; the working directory by default.
    """

    required = False

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        mode: str | None = None,
        directory: str | None = None,
    ):
        self.project, self.entity, self.name = project, entity, name
        self.mode, self.directory = mode, directory
        self._run: Any = None

    def on_start(self, run: RunInfo) -> None:
        wandb = _library("wandb")
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or run.name,
            mode=self.mode,
            dir=self.directory,
            id=_identity(run),
            resume="allow",
            config=dict(run.settings),
        )
        # Our own step: the library's step only grows, but a run may resume from an earlier one.
        self._run.define_metric("*", step_metric="step")

    def on_step(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**{f"train/{name}": value for name, value in metrics.items() if name != "step"}, "step": step})

    def on_eval(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        values = {f"eval/{name.removeprefix('eval_')}": value for name, value in metrics.items()}
        self._run.log({**values, "step": step})

    def on_end(self, run: RunInfo, outcome: str, error: str | None) -> None:
        self._run.summary["outcome"] = error or outcome
        self._run.finish(exit_code=1 if outcome == "failed" else 0)


class MLflow(Callback):
    """A callback for MLflow.

    A resumed run continues the same run there, found by a tag with the run's directory.

    Args:
        experiment: the experiment's name; it is created if it does not exist.
        tracking_uri: a server's URI, or `sqlite:///...`; the worker's MLFLOW_TRACKING_URI by default.
        run_name: the run's name by default.
        tags: further tags.
    """

    required = False

    def __init__(
        self,
        experiment: str = "kithara_ray",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ):
        self.experiment, self.tracking_uri, self.run_name = experiment, tracking_uri, run_name
        self.tags = dict(tags or {})
        self._client: Any = None
        self._id: str | None = None

    def on_start(self, run: RunInfo) -> None:
        mlflow = _library("mlflow")
        self._client = client = mlflow.MlflowClient(self.tracking_uri)
        found = client.get_experiment_by_name(self.experiment)
        experiment_id = found.experiment_id if found else client.create_experiment(self.experiment)
        identity = _identity(run)
        if run.step:
            known = client.search_runs([experiment_id], f"tags.`kithara_ray.run` = '{identity}'", max_results=1)
            self._id = known[0].info.run_id if known else None
        if self._id is not None:
            client.update_run(self._id, status="RUNNING")
            return
        tags = {**self.tags, "kithara_ray.run": identity, "kithara_ray.directory": run.directory}
        self._id = client.create_run(experiment_id, run_name=self.run_name or run.name, tags=tags).info.run_id
        for name, value in _flat(run.settings).items():
            client.log_param(self._id, name, str(value)[:_LONGEST_VALUE])

    def on_step(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        self._log("train", step, metrics)

    def on_eval(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        self._log("eval", step, {name.removeprefix("eval_"): value for name, value in metrics.items()})

    def on_end(self, run: RunInfo, outcome: str, error: str | None) -> None:
        self._client.set_tag(self._id, "kithara_ray.outcome", (error or outcome)[:_LONGEST_VALUE])
        status = {"failed": "FAILED", "interrupt": "KILLED"}.get(outcome, "FINISHED")
        self._client.set_terminated(self._id, status)

    def _log(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(f"{group}/{name}", value, now, step) for name, value in metrics.items() if name != "step"]
        self._client.log_batch(self._id, metrics=rows)


def _identity(run: RunInfo) -> str:
    return hashlib.sha256(run.directory.encode()).hexdigest()[:16]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten {"a": {"b": 1}} to {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} is not installed on rank 0's host ({error}); install it on all nodes, or leave the callback out"
        ) from error
