"""The workers' own loop with something done to it on the way; `use` puts it in the place of a run's own.

What a loop is given is called on every rank with the `Run`, in the worker's process: it is pickled by value there, and
what it needs is imported inside it.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray

from kithara_ray import Callback

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def loop_with(
    *,
    begun: Callable[[Any], None] = lambda run: None,
    built: Callable[[Any], None] = lambda run: None,
    before_step: Callable[[Any], None] = lambda run: None,
    after_step: Callable[[Any, Mapping], Mapping | None] = lambda run, metrics: None,
    trained: Callable[[Any], None] = lambda run: None,
) -> Callable[[dict], Any]:
    """A loop for `use`.

    Args:
        begun: before the model is built. built: before the first step. trained: after the last.
        before_step: each step of a run that has not ended before; `run.number` is its number.
        after_step: given its metrics too; what it returns, if anything, is taken for them.
    """

    def loop(config):
        from kithara_ray.orchestration.worker.run import Run, carry_out

        run = Run(config["spec"], config["started"])
        begun(run)
        build, train = run.build, run.train

        def building():
            build()
            built(run)
            compiled = getattr(run, "step", None)

            def step(*arguments):
                before_step(run)
                state, metrics = compiled(*arguments)
                return state, after_step(run, metrics) or metrics

            run.step = step

        def training():
            train()
            trained(run)

        run.build, run.train = building, training
        return carry_out(run)

    return loop


def use(loop: Callable[[dict], Any], patch: Any = None) -> None:
    """All runs that this process starts have this loop; until `patch`, a MonkeyPatch, is undone, if there is one."""
    from kithara_ray.orchestration import trainer

    if patch is None:
        trainer.TRAIN_LOOP = loop
    else:
        patch.setattr(trainer, "TRAIN_LOOP", loop)


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


class Recorder(Callback):
    """Writes down what it is told, a line of JSON each; may ask to stop at a step, or raise there."""

    def __init__(self, path: Path, stop_at: int = -1, raise_at: int = -1, required: bool = True):
        self.path, self.stop_at, self.raise_at, self.required = path, stop_at, raise_at, required

    def _note(self, what, *values):
        with self.path.open("a") as stream:
            stream.write(json.dumps([what, *values]) + "\n")

    def on_start(self, run):
        import jax

        self._note("start", jax.process_index(), run.name, run.step, run.total_steps, run.settings)

    def on_step(self, run, step, metrics):
        self._note("step", step, metrics)
        if step == self.raise_at:
            raise ValueError("the moon is full")
        if step == self.stop_at:
            run.stop()

    def on_eval(self, run, step, metrics):
        self._note("eval", step, metrics)

    def on_checkpoint(self, run, step, path):
        self._note("checkpoint", step, path)

    def on_end(self, run, outcome, error):
        self._note("end", outcome, error)


def noted(path: Path, what: str) -> list[list]:
    """What a Recorder was told of one kind, in turn."""
    return [row[1:] for row in map(json.loads, path.read_text().splitlines()) if row[0] == what]
