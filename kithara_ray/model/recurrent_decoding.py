"""Greedy decoding of blocks with a recurrent state, by KerasHub's loop over tokens.

B  prompts    T  max_length    K  key heads    H  head width
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from kithara_ray.errors import ConfigError
from kithara_ray.model.causal_lm import CausalLM, Factors, Frozen
from kithara_ray.model.layouts import Layouts
from kithara_ray.sharding.mesh import BATCH_AXES, replicated

# Round lengths up to this, so that prompts of similar length share a compiled program.
_LENGTH_MULTIPLE = 16


class RecurrentDecoder:
    """Decoding in one program, which ends with the last row. All processes call it together.

    Attributes:
        factors, frozen: the arrays that it decodes with. The compiled program serves any others of the same shapes.
    """

    def __init__(self, model: CausalLM, factors: Factors, frozen: Frozen):
        self._model, self.factors, self.frozen = model, factors, frozen
        self._layouts = Layouts(model.mesh)
        model.model.compile(sampler="greedy")
        with_cache = model.model.call_with_cache

        def call_with_cache(*args, **kwargs):
            logits, hidden, cache = with_cache(*args, **kwargs)
            return logits, hidden, jax.tree.map(self._rows_and_heads, cache)

        model.model.call_with_cache = call_with_cache

        def step(factors, frozen, token_ids_BT, padding_mask_BT, stop):
            with model.bind(factors, frozen, unstack=True):
                inputs = {"token_ids": token_ids_BT, "padding_mask": padding_mask_BT}
                return model.model.generate_step(inputs, stop_token_ids=stop)

        self._step = jax.jit(step, static_argnames="stop", out_shardings=replicated(model.mesh))

    def stream(
        self, prompts: Sequence[Sequence[int]], max_length: int, stop_token_ids: tuple[int, ...]
    ) -> Iterator[tuple[int, int]]:
        """Yield (number of the prompt, token) for each token, once all are decoded."""
        for number, row in enumerate(self.greedy(prompts, max_length, stop_token_ids)):
            yield from ((number, token) for token in row[len(prompts[number]) :])

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_length: int, stop_token_ids: tuple[int, ...]
    ) -> list[list[int]]:
        """Return each prompt with its continuation, the stop token included: at most `max_length` tokens."""
        out = self._step(self.factors, self.frozen, *self._batch(prompts, max_length), stop_token_ids or None)
        ids, keep = np.asarray(out["token_ids"]), np.asarray(out["padding_mask"])
        return [
            _cut(ids[row][keep[row]].tolist(), len(prompt), max_length, stop_token_ids)
            for row, prompt in enumerate(prompts)
        ]

    def _batch(self, prompts: Sequence[Sequence[int]], max_length: int):
        """Arrays (token ids, mask of the given tokens), both (B, T), with a row count that the mesh divides.

        Filler rows repeat the last prompt, so they end when it does and begin no earlier.
        """
        longest, ways = max(map(len, prompts)), self._layouts.ways
        if longest >= max_length:
            raise ConfigError(f"generate: max_length={max_length} leaves no token beside a prompt of {longest} tokens")
        shape = -(-len(prompts) // ways) * ways, -(-max_length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        token_ids, given = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row in range(shape[0]):
            prompt = prompts[min(row, len(prompts) - 1)]
            token_ids[row, : len(prompt)] = prompt
            given[row, : len(prompt)] = True
        return self._layouts.rows_of(token_ids), self._layouts.rows_of(given)

    def _rows_and_heads(self, kept: jax.Array) -> jax.Array:
        """Split by rows and heads one layer's keys and values, (B, 2, T, K, H), or its recurrent state."""
        heads = "tensor" if kept.shape[-2] % self._model.mesh.shape["tensor"] == 0 else None
        return self._layouts.constrain(kept, BATCH_AXES, *[None] * (kept.ndim - 3), heads)


def _cut(row: list[int], prompt: int, max_length: int, stop: tuple[int, ...]) -> list[int]:
    row = row[:max_length]
    end = next((i for i in range(prompt, len(row)) if row[i] in stop), None)
    return row if end is None else row[: end + 1]
