"""Compiled programs for the few shapes that batches may have."""

from collections.abc import Callable, Sequence
from typing import Any

from kithara_ray.model.causal_lm import CausalLM
from kithara_ray.train.step import AbstractBatch, Batch, abstract_batch


class ByLength:
    """One program for each length T that batches are padded to, called with (state, frozen, batch).

    Args:
        compile: makes the program for batches with these shapes and shardings.
        rows: rows of the global batch.
        shapes: (T, K) pairs, ascending; see `kithara_ray.train.step`.
    """

    def __init__(
        self,
        compile: Callable[[AbstractBatch], Callable],
        model: CausalLM,
        rows: int,
        shapes: Sequence[tuple[int, int]],
    ):
        # Compile the largest first: if any program does not fit, that one fails.
        self._programs = {
            length: compile(abstract_batch(model, rows, length, predictions))
            for length, predictions in reversed(shapes)
        }

    def __call__(self, state: Any, frozen: Any, batch: Batch) -> Any:
        return self._programs[batch["token_ids"].shape[1]](state, frozen, batch)
