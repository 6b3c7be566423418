"""A rank's signs of life: once a second it reports its phase, and the time since its last progress, to the head."""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BEAT_S = 1.0


@dataclass(frozen=True)
class Limits:
    """Seconds without progress after which a run is ended.

    Attributes:
        step_timeout_s: limit between two steps, batches of an evaluation, or batches of data, and for the callbacks of
            a step. None never ends a run.
        startup_timeout_s: limit of each phase before the first step.
        save_timeout_s: extra time for a save, beyond step_timeout_s.
        silence_timeout_s: limit without any beat from a process.
    """

    step_timeout_s: float | None
    startup_timeout_s: float
    save_timeout_s: float
    silence_timeout_s: float

    def of(self, phase: str) -> float:
        if self.step_timeout_s is None:
            return float("inf")
        if phase in ("step", "data", "eval", "callback"):
            return self.step_timeout_s
        return self.step_timeout_s + self.save_timeout_s if phase == "save" else self.startup_timeout_s


@dataclass(frozen=True)
class Beat:
    """One report of a rank: its identity, its phase and the time since its last progress.

    Attributes:
        phase: "data", "step", "eval", "save", "callback", or one of start-up's.
        step: the step in progress; 0 before the first.
        since_s: seconds since the rank last made progress, by its own clock.
    """

    rank: int
    host: str
    node_id: str
    pid: int
    phase: str
    step: int
    since_s: float

    @property
    def doing(self) -> str:
        place = f" of step {self.step}" if self.step and self.phase != "step" else ""
        return f"step {self.step}" if self.phase == "step" else f"{self.phase}{place}"


class Heart:
    """A rank's thread that reports the rank's phase to the head, and receives the head's requests.

    Args:
        node_id: the rank's node.
        send: takes (Beat, Limits), returns the head's request to all ranks: "interrupt" or nothing.
    """

    def __init__(self, rank: int, node_id: str, limits: Limits, send: Callable[[Beat, Limits], str | None]):
        self._who: dict[str, Any] = dict(rank=rank, host=socket.gethostname(), node_id=node_id, pid=os.getpid())
        self._limits, self._send = limits, send
        self._at = ("start", 0, time.monotonic())
        self.asked: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    def at(self, phase: str, step: int = 0) -> None:
        """Record progress: the rank begins this phase now."""
        self._at = (phase, step, time.monotonic())

    def stop(self) -> None:
        """Stop the beats: the loop has ended well, and silence is no failure from now on."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._tell(*self._at)
        self._tell("end", self._at[1], time.monotonic())

    def _tell(self, phase: str, step: int, since: float) -> None:
        beat = Beat(**self._who, phase=phase, step=step, since_s=time.monotonic() - since)
        try:
            self.asked = self._send(beat, self._limits) or self.asked
        except Exception:
            # The head does not answer. Ray restarts its actor, and training needs it only at the end.
            return
