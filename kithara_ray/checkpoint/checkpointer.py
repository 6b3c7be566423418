"""The Checkpointer of the public API: the place and interval of a run's checkpoints, and how many to keep."""

from collections.abc import Sequence
from dataclasses import dataclass

from kithara_ray.checkpoint.disk_format import Keep
from kithara_ray.errors import ConfigError
from kithara_ray.storage.urls import absolute

# The facts that make two runs the same, by their names in a manifest.
IDENTITY = ("base", "precision", "lora", "optimizer", "seed", "data")


@dataclass(frozen=True)
class Checkpointer:
    """Settings for saving a run, so that it can resume after any interruption.

    Attributes:
        checkpoint_dir: a directory that all hosts share, or `gs://...`, `s3://...`. A run resumes from the newest
            complete checkpoint of the same run there. A run that has finished does not train again.
        save_interval_steps: steps between two checkpoints; the last step is always saved.
        max_to_keep: the number of checkpoints to keep, including the newest; None keeps all.
        score_attribute: a metric, e.g. "eval_loss". The best checkpoints by it are kept, and each evaluation is saved.
        score_order: "min" or "max": the direction in which a score is better.
        early_stopping_patience: end the run after this many evaluations without a better `score_attribute`.
        allow_changes: settings that may differ from the run that wrote the checkpoint: "base", "precision", "lora"
            (alpha and dropout; other shapes never fit), "optimizer", "seed", "data".
        save_timeout_s: seconds that a checkpoint waits for the slowest rank.
    """

    checkpoint_dir: str
    save_interval_steps: int = 100
    max_to_keep: int | None = 5
    score_attribute: str | None = None
    score_order: str = "min"
    early_stopping_patience: int | None = None
    allow_changes: Sequence[str] = ()
    save_timeout_s: float = 900.0

    def __post_init__(self):
        for name in ("save_interval_steps", "max_to_keep", "early_stopping_patience"):
            value = getattr(self, name)
            if value is None and name != "save_interval_steps":
                continue
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"Checkpointer: {name} must be an integer >= 1, got {value!r}")
        if self.score_order not in ("min", "max"):
            raise ConfigError(f"Checkpointer: score_order must be 'min' or 'max', got {self.score_order!r}")
        if self.early_stopping_patience is not None and self.score_attribute is None:
            raise ConfigError("Checkpointer: early_stopping_patience needs score_attribute, the metric to improve")
        unknown = sorted(set(self.allow_changes) - set(IDENTITY))
        if isinstance(self.allow_changes, str) or unknown:
            raise ConfigError(
                f"Checkpointer: allow_changes must be a tuple of names out of {', '.join(IDENTITY)}, "
                f"got {self.allow_changes!r}"
            )
        object.__setattr__(self, "checkpoint_dir", absolute(str(self.checkpoint_dir)).rstrip("/"))
        object.__setattr__(self, "allow_changes", tuple(self.allow_changes))

    @property
    def keep(self) -> Keep:
        return Keep(self.max_to_keep, self.score_attribute, self.score_order)
