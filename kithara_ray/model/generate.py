"""Greedy decoding with KerasHub's own KV cache.

B  prompts    T  max_length
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.model.causal_lm import CausalLM, Factors, Frozen

# Lengths are rounded up to this, so that prompts of similar length share a compiled program.
_LENGTH_MULTIPLE = 16


def prompt_ids(inputs: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids of a text, a list of texts, an array or list of ids, or a list of these."""
    if isinstance(inputs, (str, np.ndarray)) or (isinstance(inputs, list) and inputs and isinstance(inputs[0], int)):
        inputs = [inputs]
    if not isinstance(inputs, list) or not inputs:
        raise ConfigError(f"generate: inputs must be a text, token ids or a list of these, got {type(inputs).__name__}")
    rows = [_encode(item, tokenizer) if isinstance(item, str) else [int(i) for i in item] for item in inputs]
    for number, row in enumerate(rows):
        if not row:
            raise DataError(f"generate: prompt {number} is empty")
    return rows


def _encode(text: str, tokenizer: Any) -> list[int]:
    """With the special tokens that the tokenizer adds by itself, unless the text is rendered with its BOS already."""
    rendered = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not rendered)["input_ids"]


class Decoder:
    """Greedy decoding of one model with these arrays."""

    def __init__(self, model: CausalLM, factors: Factors, frozen: Frozen):
        self._model, self._factors, self._frozen = model, factors, frozen
        model.model.compile(sampler="greedy")

        def step(factors, frozen, token_ids_BT, padding_mask_BT, stop):
            with model.bind(factors, frozen, unstack=True):
                inputs = {"token_ids": token_ids_BT, "padding_mask": padding_mask_BT}
                return model.model.generate_step(inputs, stop_token_ids=stop)

        self._step = jax.jit(step, static_argnames="stop")

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_length: int, stop_token_ids: tuple[int, ...]
    ) -> list[list[int]]:
        """Prompt and continuation of every prompt, the stop token included, at most `max_length` tokens."""
        longest = max(len(prompt) for prompt in prompts)
        if longest >= max_length:
            raise ConfigError(f"generate: max_length={max_length} leaves no token beside a prompt of {longest} tokens")
        length = -(-max_length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        token_ids = np.zeros((len(prompts), length), np.int32)
        mask = np.zeros((len(prompts), length), bool)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = prompt
            mask[row, : len(prompt)] = True
        out = self._step(self._factors, self._frozen, jnp.asarray(token_ids), jnp.asarray(mask), stop_token_ids or None)
        ids, keep = np.asarray(out["token_ids"]), np.asarray(out["padding_mask"])
        return [
            _cut(ids[row][keep[row]].tolist(), len(prompts[row]), max_length, stop_token_ids)
            for row in range(len(prompts))
        ]


def _cut(row: list[int], prompt: int, max_length: int, stop: tuple[int, ...]) -> list[int]:
    row = row[:max_length]
    end = next((i for i in range(prompt, len(row)) if row[i] in stop), None)
    return row if end is None else row[: end + 1]
