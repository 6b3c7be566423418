"""The first function of a worker: it sets the process up, then imports the loop to run there.

Ray sends an `Entry` to the workers, so this module imports nothing that must wait for the set-up. Keras reads its
backend when it is imported, and a driver needs none of a loop's imports.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kithara_ray.model import runtime

# Beginning and end of what this process did beside its start, in seconds since the epoch.
_prepared: dict[str, tuple[float, float]] = {}

Loop = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Entry:
    """Ray Train's `train_loop_per_worker`.

    Attributes:
        loop: "package.module:function", imported in the worker; or the function itself.

    The loop receives Ray Train's config. Its "spec" has the `platform`. Its "started" is the time at which this process
    began, by `time.monotonic`.
    """

    loop: str | Loop

    def prepare(self) -> None:
        """Import what the loop needs, in a thread beside Ray's own start of the worker; starts no JAX backend."""
        began = time.time()
        runtime.prepare()
        if isinstance(self.loop, str):
            imported(self.loop)
            importlib.import_module("keras_hub")
        _prepared["imports"] = (began, time.time())

    def __call__(self, config: dict[str, Any]) -> Any:
        started = time.monotonic()
        runtime.prepare()
        runtime.keep_compiled(config["spec"].platform)
        loop = imported(self.loop) if isinstance(self.loop, str) else self.loop
        ended = loop({**config, "started": started})
        # Ray would wait 30 s for this if a process is dead; after a loop that ends well, all peers are alive.
        imported("jax:distributed").shutdown()
        return ended


def times_beside(began: float) -> dict[str, tuple[float, float]]:
    """Return when this process did what `Entry.prepare` does, in seconds since `began`, a time since the epoch."""
    return {name: (round(start - began, 2), round(end - began, 2)) for name, (start, end) in _prepared.items()}


def imported(path: str) -> Any:
    """Import the object that "package.module:name" names. If it imports Keras, call `runtime.prepare` first."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
