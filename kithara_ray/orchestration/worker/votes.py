"""Collect each step's outcome and the ranks' votes, and look at them when it costs nothing.

A step's outcome is read `LOOK_BEHIND` steps later, when the devices have finished it, so they always have a step to
run. All ranks read the same numbers at the same step, so all reach the same decision.
"""

import logging
from collections.abc import Callable
from typing import Any

from kithara_ray.errors import DivergedError
from kithara_ray.sharding.agree import Ballot

logger = logging.getLogger(__name__)

# A rank's vote; a higher one is more urgent. Rank 0's callbacks cast STOP and FAILED.
GO_ON, SAVE, STOP, FAILED, INTERRUPT, PREEMPTED = range(6)
LOOK_BEHIND = 2
# With on_nan="skip", this many in a row mean a broken run, not a bad batch.
MAX_SKIPPED_IN_A_ROW = 10
_SHOWN_ROWS = 16


class Outcomes:
    """The outcomes of steps and the votes of ranks, read some steps later.

    Args:
        ballot: combines votes and outcomes of all ranks.
        on_nan: "stop" or "skip".
        rows_of: a step's number -> the rows of its batch, as numbered in the source.
        on_skip: called with the step and its rows, on every rank.
    """

    def __init__(
        self,
        ballot: Ballot,
        on_nan: str,
        rows_of: Callable[[int], list[int]],
        on_skip: Callable[[int, list[int]], None],
    ):
        self.ballot, self.on_nan, self.rows_of, self.on_skip = ballot, on_nan, rows_of, on_skip
        self._waiting: dict[int, Any] = {}
        self._in_a_row = 0

    def cast(self, step: int, vote: int, metrics: dict[str, Any]) -> None:
        """Record this rank's vote and the step's metrics after a step was started. Waits for nothing."""
        self._waiting[step] = self.ballot.cast(vote, metrics["loss"], metrics["grad_norm"])

    def look(self, until: int, take_votes: bool = True) -> int:
        """Wait for the steps up to `until`, and check that their losses are finite. Return the highest vote of all
        ranks.

        Without `take_votes`, votes are left for the next look.

        Raises:
            TrainingError: a loss or gradient is not finite; the message names the rows of its batch.
        """
        highest = GO_ON
        for step in [step for step in sorted(self._waiting) if step <= until]:
            vote, is_bad = (int(value) for value in self._waiting[step])
            if take_votes or not vote:
                del self._waiting[step]
            else:
                self._waiting[step] = (vote, 0)
            self._in_a_row = self._in_a_row + 1 if is_bad else 0
            if is_bad:
                self._not_finite(step)
            highest = max(highest, vote)
        return highest if take_votes else GO_ON

    def _not_finite(self, step: int) -> None:
        rows = self.rows_of(step)
        shown = ", ".join(map(str, rows[:_SHOWN_ROWS])) + (", ..." if len(rows) > _SHOWN_ROWS else "")
        what = f"step {step}: the loss or its gradient is not finite"
        what += f"; the batch holds rows {shown} of the dataset" if rows else ""
        if self.on_nan == "stop":
            raise DivergedError(
                f"{what}. Look at these rows, lower the learning rate, or give Trainer(on_nan='skip') to skip such "
                "steps"
            )
        self.on_skip(step, rows)
        if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(f"{what}; so were {MAX_SKIPPED_IN_A_ROW} steps in a row: lower the learning rate")
        logger.warning("%s; left out", what)
