"""Greedy decoding of many prompts, on weights that stay in place.

    R  prompts computed at a time    B  rows of a step    P  positions of a prompt    S  positions of the caches

Prompts are computed R at a time, one pass each. Then every step takes one token of each of the B rows through the
blocks. A row that has ended gives its place to the next prompt.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kithara_ray.errors import ConfigError
from kithara_ray.model.blocks import attention
from kithara_ray.model.blocks.cached import Cache
from kithara_ray.model.causal_lm import CausalLM, Factors, Frozen
from kithara_ray.model.decoding_programs import Programs, Values
from kithara_ray.model.layouts import Layouts, keep_weights_in_place
from kithara_ray.model.recurrent_decoding import RecurrentDecoder

# Lengths are rounded up to multiples of this and, from 64 tokens on, of an eighth to a quarter of themselves, so that
# prompts of similar length share compiled programs.
_LENGTH_MULTIPLE = 8
# Rows of a step at most, and prompts computed at a time, on one device.
_ROWS, _PROMPTS = 64, 8
# Steps begun before a token is read: the host prepares the next step while the device computes.
_AHEAD = 2


def decoder_of(model: CausalLM, factors: Factors, frozen: Frozen) -> "Decoder | RecurrentDecoder":
    """Return the decoder of a model built with `scan=False`; the model must have no other use."""
    if model.mesh.size > 1:
        keep_weights_in_place(model)
    attends = all(map(attention.attends, model.chain.blocks))
    return (Decoder if attends else RecurrentDecoder)(model, factors, frozen)


class Decoder:
    """Greedy decoding with one model. All processes call it together.

    Attributes:
        factors, frozen: the arrays that it decodes with. The compiled programs serve any others of the same shapes.
        programs: the compiled programs.
    """

    def __init__(self, model: CausalLM, factors: Factors, frozen: Frozen):
        self._model, self.factors, self.frozen = model, factors, frozen
        self.programs, self._layouts = Programs(model), Layouts(model.mesh)
        self._empty = jax.jit(self._empty_cache, static_argnames=("rows", "places"))
        self._place = jax.jit(self._placed, donate_argnums=0)
        # The tokens before are still to be read.
        self.place_tokens = jax.jit(lambda into, new, rows: into.at[_or_none(rows, into)].set(new, mode="drop"))

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_length: int, stop_token_ids: tuple[int, ...]
    ) -> list[list[int]]:
        """Return each prompt with its continuation, the stop token included: at most `max_length` tokens."""
        rows = [list(prompt) for prompt in prompts]
        for number, token in self.stream(prompts, max_length, stop_token_ids):
            rows[number].append(token)
        return rows

    def stream(
        self, prompts: Sequence[Sequence[int]], max_length: int, stop_token_ids: tuple[int, ...]
    ) -> Iterator[tuple[int, int]]:
        """Yield (number of the prompt, token) for each token of the continuations, as they are decoded.

        Raises:
            ConfigError: a prompt has `max_length` tokens or more.
        """
        longest = max(map(len, prompts))
        if longest >= max_length:
            raise ConfigError(f"generate: max_length={max_length} leaves no token beside a prompt of {longest} tokens")
        return _Run(self, prompts, max_length, stop_token_ids).tokens()

    def sizes(self, prompts: int) -> tuple[int, int]:
        """(B, R) for a number of prompts. On several devices rows keep their places, so all prompts are rows."""
        if self._model.mesh.size > 1:
            rows = -(-prompts // self._layouts.ways) * self._layouts.ways
            return rows, rows
        rows = min(prompts, _ROWS)
        rows = next((size for size in (1, 2, 4) if rows <= size), -(-rows // _PROMPTS) * _PROMPTS)
        return rows, min(rows, _PROMPTS)

    def empty(self, like: Sequence[Cache], rows: int, places: int) -> list[Cache]:
        """Caches (B, K, S, H) for prompts' caches (R, K, P, H)."""
        return [Cache(*(self._empty(array, rows=rows, places=places) for array in cache)) for cache in like]

    def place(self, into: Sequence[Cache], new: Sequence[Cache], rows: np.ndarray | None) -> list[Cache]:
        """Write prompts' caches (R, ...) into these rows of caches, in place; None writes all, -1 drops one."""
        return jax.tree.map(lambda old, array: self._place(old, array, rows), into, new)

    def _empty_cache(self, like_RKPH, rows, places):
        _, heads, _, width = like_RKPH.shape
        return self._layouts.rows_and_heads(jnp.zeros((rows, heads, places, width), like_RKPH.dtype))

    def _placed(self, into_BKSH, new_RKPH, rows):
        if rows is None:
            return self._layouts.rows_and_heads(jax.lax.dynamic_update_slice(into_BKSH, new_RKPH, (0, 0, 0, 0)))
        return into_BKSH.at[_or_none(rows, into_BKSH), :, : new_RKPH.shape[2]].set(new_RKPH, mode="drop")


def _or_none(rows: jax.Array, of: jax.Array) -> jax.Array:
    """Rows whose negative numbers stand for none: a row behind the last one is dropped."""
    return jnp.where(rows < 0, of.shape[0], rows)


class _Run:
    """One call of `Decoder.stream`."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Sequence[int]], max_length: int, stop: tuple[int, ...]):
        self._decoder, self._prompts, self._stop = decoder, prompts, frozenset(stop)
        self._max_length = max_length
        self._values = Values(decoder._model, decoder.factors, decoder.frozen)
        self._rows, self._at_once = decoder.sizes(len(prompts))
        self._places = _rounded(max_length)
        # Prompts of similar length are computed together.
        self._waiting = deque(sorted(range(len(prompts)), key=lambda number: len(prompts[number])))
        # The prompt of each row, or None; the place in the cache of each row's next token.
        self._prompt_of: list[int | None] = [None] * self._rows
        self._positions = np.zeros(self._rows, np.int32)
        self._lengths = [len(prompt) for prompt in prompts]
        self._caches: list[Cache] = []
        self._tokens: Any = None  # the last token (B,) of each row

    def tokens(self) -> Iterator[tuple[int, int]]:
        begun: deque[tuple[jax.Array, list[tuple[int, int]]]] = deque()
        while True:
            free = [row for row, prompt in enumerate(self._prompt_of) if prompt is None]
            if self._waiting and (len(free) >= self._at_once or len(free) == self._rows):
                begun.append(self._fill(free))
            elif self._unfinished():
                begun.append(self._step())
            elif not begun:
                return
            else:
                yield from self._read(*begun.popleft())
                continue
            if len(begun) > _AHEAD:
                yield from self._read(*begun.popleft())

    def _unfinished(self) -> bool:
        """True if a row has a token to come that was not begun."""
        pairs = zip(self._prompt_of, self._positions, strict=True)
        return any(prompt is not None and position < self._max_length - 1 for prompt, position in pairs)

    def _fill(self, free: list[int]) -> tuple[jax.Array, list[tuple[int, int]]]:
        """Compute the next prompts into free rows."""
        rows = free[: self._at_once]
        taken = [(place, row, self._waiting.popleft()) for place, row in enumerate(rows) if self._waiting]
        chosen = [prompt for *_, prompt in taken]
        # The rest of the places repeats the last prompt.
        chosen += chosen[-1:] * (self._at_once - len(chosen))
        lengths = np.array([self._lengths[prompt] for prompt in chosen], np.int32)
        ids = np.zeros((self._at_once, _rounded(int(lengths.max()))), np.int32)
        for place, prompt in enumerate(chosen):
            ids[place, : lengths[place]] = self._prompts[prompt]
        tokens, caches = self._decoder.programs.prompts(self._values, ids, lengths, self._max_length)
        into = None
        if self._at_once < self._rows:
            into = np.full(self._at_once, -1, np.int32)
            for place, row, _ in taken:
                into[place] = row
        if not self._caches:
            self._caches = self._decoder.empty(caches, self._rows, self._places)
            self._tokens = jnp.zeros(self._rows, jnp.int32)
        self._caches = self._decoder.place(self._caches, caches, into)
        self._tokens = tokens if into is None else self._decoder.place_tokens(self._tokens, tokens, into)
        self._positions = self._positions.copy()  # a program may still read the array that it was given
        for place, row, prompt in taken:
            self._prompt_of[row], self._positions[row] = prompt, lengths[place]
        return tokens, [(place, prompt) for place, _, prompt in taken]

    def _step(self) -> tuple[jax.Array, list[tuple[int, int]]]:
        taken = [(row, prompt) for row, prompt in enumerate(self._prompt_of) if prompt is not None]
        self._tokens = self._decoder.programs.step(
            self._values, self._tokens, self._positions, self._caches, self._max_length
        )
        self._positions = np.minimum(self._positions + 1, self._places - 1)
        return self._tokens, taken

    def _read(self, tokens: jax.Array, taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield the tokens of the rows that had not ended before; free the rows that have now."""
        values = np.asarray(tokens)
        for place, prompt in taken:
            if self._lengths[prompt] == self._max_length:
                continue
            token = int(values[place])
            yield prompt, token
            self._lengths[prompt] += 1
            if token in self._stop:
                self._lengths[prompt] = self._max_length
            if self._lengths[prompt] == self._max_length:
                self._prompt_of[self._prompt_of.index(prompt)] = None


def _rounded(length: int) -> int:
    multiple = max(_LENGTH_MULTIPLE, 2 ** (length.bit_length() - 3))
    return -(-length // multiple) * multiple
