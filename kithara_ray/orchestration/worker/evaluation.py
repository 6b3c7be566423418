"""The evaluation of a run: its rows, its schedule, and the program that computes their loss."""

from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from kithara_ray.model.causal_lm import CausalLM, Frozen, Params
from kithara_ray.orchestration.data.loading import held_out_batches
from kithara_ray.orchestration.data.unbounded import EndlessOrder
from kithara_ray.orchestration.worker.spec import EvalSpec
from kithara_ray.sft.batches.order import Order
from kithara_ray.train.programs import ByLength
from kithara_ray.train.step import compile_eval


class Evaluation:
    """One rank's part of the evaluation; all ranks call its methods together."""

    def __init__(self, spec: EvalSpec, mesh: Mesh, platform: str):
        self._spec = spec
        self._data = held_out_batches(spec.data, spec.max_samples, mesh, platform)

    def compile(self, model: CausalLM, params: Params, frozen: Frozen) -> None:
        """Compile a program for each length of a batch."""
        data = self._data
        self._program = ByLength(
            lambda batch: compile_eval(model, params, frozen, batch), model, data.order.batch_rows, data.shapes
        )

    def is_due(self, step: int, order: Order | EndlessOrder) -> bool:
        """Return True if an evaluation is due after `step` steps; `order` is that of the training batches."""
        if self._spec.every_steps:
            return step % self._spec.every_steps == 0
        epoch, index = order.locate(step)
        return index == 0 and bool(self._spec.every_epochs) and epoch % self._spec.every_epochs == 0

    def run(self, params: Params, frozen: Frozen, alive: Callable[[], None]) -> dict[str, float]:
        """Return the token-weighted loss and perplexity over all rows.

        Args:
            alive: called after every batch is read.
        """
        total = weight = 0.0
        for number in range(self._data.order.steps_of(0)):
            batch, _ = self._data.batch(number)
            alive()
            loss, tokens = self._program(params, frozen, batch)
            total, weight = total + float(loss), weight + float(tokens)
        loss = total / max(weight, 1.0)
        return {"eval_loss": loss, "eval_perplexity": float(np.exp(loss)), "eval_tokens": weight}
