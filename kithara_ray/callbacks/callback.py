"""The callback protocol: the events that a run reports on rank 0, and the requests that it accepts there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunInfo:
    """The facts about a run that its callbacks receive.

    Attributes:
        name, directory: the run's; the directory is on the head node, or a URL.
        step: the number of steps done when this attempt began; above 0 for a run that resumes.
        total_steps: the step at which the run ends.
        parameters, trainable: the number of parameters of the model with its adapter, and of the trainable ones.
        settings: the arguments of the run, as in run.json; without secrets.
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
        """Ask all ranks to save and exit at the same step, at most three steps from now.

        The run ends normally (`TrainResult.stopped == "callback"`), and does not train further when it is started
        again.
        """
        self.is_asked_to_stop = True


class Callback:
    """A receiver of a run's events. Override the methods that you need; here, every method does nothing.

    A callback is pickled and runs in the worker of rank 0, between two steps: all ranks wait for it. The data that it
    collects stays in that worker's process, so the callback must write it somewhere. After a failure, a run starts
    again with the callback as it was pickled. `on_start` then reports in `run.step` the step from which the run
    resumes.

    An exception from `on_start` ends the run before anything is loaded. After an exception from another method, all
    ranks save and exit at the same step, with a `TrainingError` that names the callback and the step. The model holds
    the adapter of that step.

    Attributes:
        required: if False, an error after `on_start` is logged, the run continues, and this callback is not called
            again.
    """

    required = True

    def on_start(self, run: RunInfo) -> None:
        """Handle the start: the model is built, and nothing is loaded yet."""

    def on_step(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        """Handle a logged step (`log_steps_interval`): `metrics` is a row of `TrainResult.history`."""

    def on_eval(self, run: RunInfo, step: int, metrics: Mapping[str, float]) -> None:
        """Handle an evaluation: eval_loss, eval_perplexity, eval_tokens."""

    def on_checkpoint(self, run: RunInfo, step: int, path: str) -> None:
        """Handle a complete checkpoint. Its write overlaps training: this may come some steps after `step`."""

    def on_end(self, run: RunInfo, outcome: str, error: str | None) -> None:
        """Handle the end of the run in rank 0's process; not called if that process is killed.

        Args:
            outcome: "steps", "early_stopping", "callback", "interrupt", or "failed".
            error: the reason if the run failed.
        """
