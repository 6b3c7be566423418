"""Learning rates over a run: a linear warm-up, then constant, linear or cosine. The formulas are transformers'."""

import math
from typing import Any

import keras

from kithara_ray.errors import ConfigError

SHAPES = ("constant", "linear", "cosine")


@keras.saving.register_keras_serializable(package="kithara_ray")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A warm-up from 0 to `peak`, then `shape` down to `final` x peak at `total_steps`, then constant.

    Args:
        peak: the learning rate after the warm-up.
        shape: "constant" (ignores total_steps and final), "linear" or "cosine" (half a period).
        total_steps: optimizer steps of the run, warm-up included.
        final: fraction of the peak.
    """

    def __init__(
        self, peak: float, shape: str = "cosine", total_steps: int | None = None, warmup_steps: int = 0, final=0.0
    ):
        if shape not in SHAPES:
            raise ConfigError(f"schedule must be one of {', '.join(SHAPES)}, got {shape!r}")
        if warmup_steps < 0 or not 0 <= final <= 1 or not peak > 0:
            raise ConfigError(
                f"a schedule needs a learning rate > 0, warmup_steps >= 0 and 0 <= final <= 1, got {peak}, "
                f"{warmup_steps} and {final}"
            )
        if shape != "constant" and (total_steps is None or total_steps <= warmup_steps):
            raise ConfigError(f"a {shape} schedule needs total_steps > warmup_steps={warmup_steps}, got {total_steps}")
        self.peak, self.shape, self.total_steps = peak, shape, total_steps
        self.warmup_steps, self.final = warmup_steps, final

    def __call__(self, step):
        ops: Any = keras.ops  # its annotations admit None
        step = ops.cast(step, "float32")
        rising = step / max(1, self.warmup_steps)
        return self.peak * ops.where(step < self.warmup_steps, rising, self._after_warmup(step))

    def _after_warmup(self, step):
        ops: Any = keras.ops
        if self.shape == "constant":
            return ops.ones_like(step)
        assert self.total_steps is not None  # only "constant" goes without
        progress = ops.clip((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 0.0, 1.0)
        falling = 1 - progress if self.shape == "linear" else 0.5 * (1 + ops.cos(math.pi * progress))
        return self.final + (1 - self.final) * falling

    def get_config(self):
        return {
            "peak": self.peak,
            "shape": self.shape,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "final": self.final,
        }
