"""The workers' own loop with something done to it on the way: for `kithara_ray.orchestration.trainer.train_loop`.

What a loop is given is called on every rank with the `Run`, in the worker's process: it is pickled by value there, and
what it needs is imported inside it.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def loop_with(
    *,
    begun: Callable[[Any], None] = lambda run: None,
    built: Callable[[Any], None] = lambda run: None,
    before_step: Callable[[Any], None] = lambda run: None,
    after_step: Callable[[Any, Mapping], Mapping | None] = lambda run, metrics: None,
    trained: Callable[[Any], None] = lambda run: None,
) -> Callable[[dict], Any]:
    """A `train_loop`.

    Args:
        begun: before the model is built. built: before the first step. trained: after the last.
        before_step: each step of a run that has not ended before; `run.number` is its number.
        after_step: given its metrics too; what it returns, if anything, is taken for them.
    """

    def loop(config):
        from kithara_ray.model import runtime
        from kithara_ray.orchestration.worker.run import Run

        runtime.prepare()
        run = Run(config["spec"], time.monotonic())
        begun(run)
        run.build()
        built(run)
        compiled = getattr(run, "step", None)

        def step(*arguments):
            before_step(run)
            state, metrics = compiled(*arguments)
            return state, after_step(run, metrics) or metrics

        run.step = step
        run.train()
        trained(run)
        return run.finish()

    return loop


def logits_of(run: Any, tokens: np.ndarray) -> np.ndarray:
    """Of int32 token ids (B, T) by the run's sharded model as it is now; all ranks ask together, each gets all."""
    import jax

    from kithara_ray.sharding.mesh import batch_sharding, replicated

    def place(array):
        return jax.make_array_from_callback(array.shape, batch_sharding(run.mesh), lambda index: array[index])

    compute = jax.jit(run.model.logits_BTV, out_shardings=replicated(run.mesh))
    arrays = run.state["params"], run.frozen, place(tokens), place(np.ones_like(tokens))
    return np.asarray(compute(*arrays))


def writes_logits(path: Path, tokens: np.ndarray) -> Callable[[Any], None]:
    """For `trained`: rank 0 writes them to `path`."""

    def write(run):
        logits = logits_of(run, tokens)
        if run.rank == 0:
            np.save(path, logits)

    return write
