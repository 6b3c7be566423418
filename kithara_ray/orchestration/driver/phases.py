"""The driver's phases of a run's start, as they are timed: one after the other, and what goes on beside them."""

import contextlib
import time
from collections.abc import Iterator

from kithara_ray.orchestration.worker.spec import Start


class Phases:
    """The clock of a run's start; it begins with the object."""

    def __init__(self):
        self.began = time.time()
        self._entered: list[tuple[str, float]] = []
        self._beside: dict[str, tuple[float, float]] = {}

    def enter(self, name: str) -> None:
        """Begin a phase, and so end the one before it."""
        self._entered.append((name, time.time()))

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Time work that is done beside the phases, in another thread."""
        began = time.time()
        try:
            yield
        finally:
            self._beside[name] = (round(began - self.began, 2), round(time.time() - self.began, 2))

    def start(self) -> Start:
        """Return the phases up to the last one entered, which the workers time."""
        ends = [at for _, at in self._entered[1:]]
        phases = {name: round(end - at, 2) for (name, at), end in zip(self._entered, ends, strict=False)}
        return Start(self.began, self._entered[-1][1], phases, dict(self._beside))
