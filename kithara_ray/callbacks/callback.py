"""The protocol: what a run tells on rank 0, and what may be asked of it there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunInfo:
    """What a callback is told of its run.

    Attributes:
        name, directory: of the run; the directory is on the head node, or a URL.
        step: how many steps the state had seen when this attempt began; above 0 where a run goes on.
        total_steps: at which it ends.
        parameters, trainable: of the model with its adapter, and those of them that are trained.
        settings: the arguments of the run, as run.json has them; without secrets.
    """

    name: str
    directory: str
    step: int
    total_steps: int
    parameters: int
    trainable: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_asked_to_stop: bool = False

    def stop(self) -> None:
        """Ask all ranks to save and to leave at the same step, three steps from here at most.

        The run ends well (`TrainResult.stopped == "callback"`), and is not trained on when it is started again.
        """
        self.is_asked_to_stop = True


class Callback:
    """Told what happens in a run. Override what is of interest; every method does nothing here.

    A callback is pickled and runs in the worker of rank 0, between two steps: all ranks wait for it. What it collects
    stays in that worker's process, so it has to be written somewhere. Where a run starts again after a failure, the
    callback begins as it was pickled, and `on_start` tells with `run.step` from where the run goes on.

    What `on_start` raises ends the run before anything is loaded. What another method raises lets all ranks save and
    leave at the same step, with a `TrainingError` that names the callback and the step; the adapter of that step is in
    the model.

    Attributes:
        required: False: an error after `on_start` is logged, the run goes on, and this callback is told no more.
    """

    required = True

    def on_start(self, run: RunInfo) -> None:
        """The model is built; nothing is loaded yet."""

    def on_step(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        """A step that is logged (`log_steps_interval`): a row of `TrainResult.history`."""

    def on_eval(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation: eval_loss, eval_perplexity, eval_tokens."""

    def on_checkpoint(self, run: RunInfo, step: int, path: str) -> None:
        """A checkpoint is whole. It is written while training goes on, so this may come some steps after `step`."""

    def on_end(self, run: RunInfo, outcome: str, error: str | None) -> None:
        """The run leaves rank 0's process: not called where that is killed.

        Args:
            outcome: "steps", "early_stopping", "callback", "interrupt", or "failed".
            error: why it failed.
        """
