"""What a user asked for, as the driver understands it."""

from typing import Any

from ray.train import CheckpointConfig, RunConfig

from kithara_ray.checkpoint.checkpointer import Checkpointer
from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.orchestration.data.datasets import Dataloader
from kithara_ray.storage.urls import join


def evaluates(train: Dataloader, evaluation: Dataloader | None) -> bool:
    """Whether a run evaluates. Raises ConfigError where two dataloaders say on what."""
    if evaluation is not None and evaluation.eval_fraction is not None:
        raise ConfigError("Trainer: eval_fraction belongs to train_dataloader; eval_dataloader is evaluated on whole")
    if evaluation is not None and train.eval_fraction is not None:
        raise ConfigError("Trainer takes one of eval_dataloader and train_dataloader's eval_fraction")
    return evaluation is not None or train.eval_fraction is not None


def choose(checkpointer: Any, run_config: RunConfig, evaluates: bool) -> Checkpointer | None:
    """The run's checkpointer: the one given, or what Ray's configurations ask for, or none.

    Ray's `CheckpointConfig` speaks of checkpoints that are reported to Ray. None are here, a report costs 2 s; its
    numbers are taken for our own, in `<storage_path>/<name>/checkpoints`. `FailureConfig(max_failures=...)` alone also
    asks for checkpoints there.
    """
    asked = run_config.checkpoint_config
    if checkpointer is None and (asked != CheckpointConfig() or run_config.failure_config.max_failures):
        if run_config.storage_filesystem is not None:
            raise UnsupportedError(
                "RunConfig(storage_filesystem=...) with checkpoints: they are written through fsspec; give "
                "Trainer(checkpointer=Checkpointer('gs://...'))"
            )
        checkpointer = Checkpointer(
            join(str(run_config.storage_path), run_config.name, "checkpoints"),
            max_to_keep=asked.num_to_keep if asked != CheckpointConfig() else 2,
            score_attribute=asked.checkpoint_score_attribute,
            score_order=asked.checkpoint_score_order,
        )
    elif checkpointer is not None:
        if not isinstance(checkpointer, Checkpointer):
            raise ConfigError(f"Trainer: checkpointer must be a Checkpointer, got {type(checkpointer).__name__}")
        if asked != CheckpointConfig():
            raise ConfigError(
                "Trainer: RunConfig(checkpoint_config=...) beside checkpointer=: the Checkpointer says what is kept; "
                "leave checkpoint_config out"
            )
    score = checkpointer.score_attribute if checkpointer else None
    if score and score.startswith("eval_") and not evaluates:
        raise ConfigError(
            f"Checkpointer: score_attribute={score!r} needs Trainer(eval_dataloader=...) or "
            "Dataloader(eval_fraction=...)"
        )
    return checkpointer
