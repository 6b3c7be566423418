"""Trace chosen steps on rank 0 with JAX's profiler, as an `.xplane.pb` for XProf and TensorBoard's profile plugin."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kithara_ray.errors import ConfigError
from kithara_ray.storage.places import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Profiler:
    """The steps to trace, and the destination of the trace.

    Attributes:
        directory: on rank 0's host, or `gs://...`, `s3://...`; `plugins/profile/<time>/` in it holds the trace.
        steps: the first and the last traced step. The first steps of a run compile and fill caches.
    """

    directory: str
    steps: Sequence[int] = (10, 12)

    def __post_init__(self):
        steps = self.steps
        if isinstance(steps, str) or len(steps) != 2 or not all(isinstance(step, int) for step in steps):
            raise ConfigError(f"Profiler: steps must be two numbers, the first and the last step, got {steps!r}")
        if not 1 <= steps[0] <= steps[1]:
            raise ConfigError(f"Profiler: steps must be 1 <= first <= last, got {tuple(steps)}")
        object.__setattr__(self, "steps", tuple(steps))


class Tracer:
    """A trace of the chosen steps; `settings` None traces nothing. A failed trace does not end the run."""

    def __init__(self, settings: Profiler | None):
        self._settings, self._done = settings, settings is None
        self._local: str | None = None

    def before(self, step: int, state: Any) -> None:
        """Start the trace if `step`, which is about to start with `state`, is the first to trace."""
        if self._settings is None or self._done or step != self._settings.steps[0]:
            return
        import jax

        try:
            jax.block_until_ready(state)
            place = Place(self._settings.directory)
            self._local = place.path() if place.is_local else tempfile.mkdtemp(prefix="kithara_ray_profile_")
            jax.profiler.start_trace(self._local)
        except Exception as error:
            self._give_up(error)

    def after(self, step: int, state: Any) -> None:
        """End the trace if `step`, which has started and returns `state`, is the last to trace."""
        if self._settings is not None and self._local is not None and step >= self._settings.steps[1]:
            self.finish(state)

    def finish(self, state: Any = None) -> None:
        """End a trace that is under way. The run calls this at its end, in case the last traced step never came."""
        if self._done or self._local is None:
            return
        import jax

        try:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._publish()
            self._done = True
        except Exception as error:
            self._give_up(error)

    def _publish(self) -> None:
        assert self._settings is not None
        assert self._local is not None
        place = Place(self._settings.directory)
        if place.is_local:
            return
        import shutil

        root = Path(self._local)
        for path in sorted(root.rglob("*")):
            if path.is_file():
                parent = path.relative_to(root).parent.as_posix()
                place.put(path, "" if parent == "." else parent, path.name)
        shutil.rmtree(root, ignore_errors=True)

    def _give_up(self, error: Exception) -> None:
        self._done = True
        assert self._settings is not None
        logger.warning("steps %s were not traced: %s: %s", self._settings.steps, type(error).__name__, error)
