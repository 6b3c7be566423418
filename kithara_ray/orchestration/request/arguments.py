"""Check the Trainer's arguments, and turn them into parts of a `RunRequest`."""

import math
from collections.abc import Sequence
from typing import Any

from ray.train import CheckpointConfig, RunConfig

from kithara_ray.callbacks import Profiler
from kithara_ray.checkpoint.checkpointer import Checkpointer
from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.orchestration.data.datasets import Dataloader
from kithara_ray.orchestration.request.run_request import EvalRequest
from kithara_ray.orchestration.request.snapshots import Snapshots
from kithara_ray.storage.urls import absolute, join


def check_counts(**counts: int | None) -> None:
    """Raise ConfigError for a number that is given and is not an integer >= 1."""
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"Trainer: {name} must be an integer >= 1, got {value!r}")


def check_factor(name: str, value: float | None) -> None:
    """Raise ConfigError for a value that is given and is not a number >= 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 <= value < math.inf):
        raise ConfigError(f"Trainer: {name} must be a number >= 0, got {value!r}")


def check_one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError for a value that is not among the choices."""
    if value not in choices:
        raise ConfigError(f"Trainer: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_at_most_one(**given: Any) -> None:
    """Raise ConfigError if both of two arguments are given."""
    if all(value is not None for value in given.values()):
        values = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(f"Trainer takes one of {' and '.join(given)}, got {values}")


def check_endless(train: Dataloader, evaluation: Dataloader | None, steps: int | None, rows: int | None) -> None:
    """Raise ConfigError for a stream without the number at which to stop reading it."""
    if train.dataset.is_endless and steps is None:
        raise ConfigError("the training data streams, so an epoch has no end; give steps=")
    if evaluation is not None and evaluation.dataset.is_endless and rows is None:
        raise ConfigError("the evaluation data streams and has no end; give max_eval_samples=")


def evaluated_of(train: Dataloader, evaluation: Dataloader | None) -> Dataloader | None:
    """Return the source of the evaluation rows: train itself, if it has an eval_fraction; None evaluates nothing."""
    if evaluation is not None and evaluation.eval_fraction is not None:
        raise ConfigError("Trainer: eval_fraction is for train_dataloader; all of eval_dataloader is evaluated")
    if evaluation is not None and train.eval_fraction is not None:
        raise ConfigError("Trainer takes one of eval_dataloader and train_dataloader's eval_fraction")
    return train if train.eval_fraction is not None else evaluation


def evaluation_of(
    loader: Dataloader | None, every_steps: int | None, every_epochs: int | None, max_samples: int | None
) -> EvalRequest | None:
    """Return the evaluation, after each epoch by default; None without evaluation data."""
    if loader is None:
        return None
    if every_steps is None and every_epochs is None:
        every_epochs = 1
    return EvalRequest(loader, every_steps, every_epochs, max_samples)


def checkpointer_of(given: Any, run_config: RunConfig, evaluates: bool) -> Checkpointer | None:
    """Return the run's checkpointer: the one given, one that Ray's configurations ask for, or None.

    Ray's `CheckpointConfig` describes checkpoints that are reported to Ray. This library reports none, since a report
    costs 2 s. It applies those numbers to its own checkpoints, in `<storage_path>/<name>/checkpoints`.
    `FailureConfig(max_failures=...)` without a `CheckpointConfig` also asks for checkpoints there.
    """
    asked, failures, checkpointer = run_config.checkpoint_config, run_config.failure_config, given
    assert asked is not None  # Ray's RunConfig fills both in
    assert failures is not None
    if checkpointer is None and (asked != CheckpointConfig() or failures.max_failures):
        if run_config.storage_filesystem is not None:
            raise UnsupportedError(
                "RunConfig(storage_filesystem=...) with checkpoints: they are written with fsspec; give "
                "Trainer(checkpointer=Checkpointer('gs://...'))"
            )
        checkpointer = Checkpointer(
            join(str(run_config.storage_path), str(run_config.name), "checkpoints"),
            max_to_keep=asked.num_to_keep if asked != CheckpointConfig() else 2,
            score_attribute=asked.checkpoint_score_attribute,
            score_order=asked.checkpoint_score_order,
        )
    elif checkpointer is not None:
        if not isinstance(checkpointer, Checkpointer):
            raise ConfigError(f"Trainer: checkpointer must be a Checkpointer, got {type(checkpointer).__name__}")
        if asked != CheckpointConfig():
            raise ConfigError(
                "Trainer: RunConfig(checkpoint_config=...) with checkpointer=: the Checkpointer decides what is kept; "
                "leave checkpoint_config out"
            )
    score = checkpointer.score_attribute if checkpointer else None
    if score and score.startswith("eval_") and not evaluates:
        raise ConfigError(
            f"Checkpointer: score_attribute={score!r} needs Trainer(eval_dataloader=...) or "
            "Dataloader(eval_fraction=...)"
        )
    return checkpointer


def snapshots_of(every: int | None, directory: str | None, run_config: RunConfig, has_lora: bool) -> Snapshots | None:
    """Return the settings of adapters exported during training; None without `export_every_steps`.

    The default directory is in the run's own.
    """
    if every is None:
        if directory is not None:
            raise ConfigError("Trainer: export_dir= is where export_every_steps= writes; give both, or neither")
        return None
    if directory is not None and directory.startswith("hf://"):
        raise UnsupportedError("Trainer: export_dir must be a directory or on an object store, not a Hub repository")
    if not has_lora:
        raise UnsupportedError(
            "Trainer: export_every_steps= writes adapters, and all weights of this model are trained; give a "
            "checkpointer, or lora_rank="
        )
    default = join(str(run_config.storage_path), str(run_config.name), "adapters")
    return Snapshots(every, absolute(str(directory or default)))


def profiler_of(given: Any) -> Profiler | None:
    """Return the profiler, with its directory resolved on the driver."""
    if given is None:
        return None
    if not isinstance(given, Profiler):
        raise ConfigError(
            f"Trainer: profiler must be a kithara_ray.Profiler(directory, steps=(first, last)), "
            f"got {type(given).__name__}"
        )
    return Profiler(absolute(str(given.directory)), given.steps)


def prompts_of(given: Any) -> tuple[Any, ...]:
    """Return the report's prompts. A single text is refused, as it would be split into letters."""
    if isinstance(given, str):
        raise ConfigError(f"Trainer: report_prompts must be a list of prompts, got the text {given[:40]!r}")
    return tuple(given)
