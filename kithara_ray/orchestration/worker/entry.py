"""A worker's first function: it sets the process up, then imports the loop that runs there.

Ray carries an `Entry` to the workers, so this module imports nothing that must wait for the set-up: Keras reads its
backend when it is imported, and a driver needs none of what a loop imports.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kithara_ray.model import runtime

Loop = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Entry:
    """Ray Train's `train_loop_per_worker`.

    Attributes:
        loop: "package.module:function", imported in the worker; or the function itself.

    The loop is given Ray Train's config, whose "spec" says `platform`, and in it "started": when this process began,
    by `time.monotonic`.
    """

    loop: str | Loop

    def __call__(self, config: dict[str, Any]) -> Any:
        started = time.monotonic()
        runtime.prepare()
        runtime.keep_compiled(config["spec"].platform)
        loop = imported(self.loop) if isinstance(self.loop, str) else self.loop
        ended = loop({**config, "started": started})
        # Where a process is dead Ray would wait 30 s for this; a loop that ends well has all its peers.
        imported("jax:distributed").shutdown()
        return ended


def imported(path: str) -> Any:
    """What "package.module:name" names. For modules that import Keras, after `runtime.prepare`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
