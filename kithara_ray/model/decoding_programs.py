"""The compiled pieces of decoding: what comes before the blocks, a block, and the next token behind the last block.

    B  rows    T  positions of this call: a prompt's, or one    D  hidden width

Equal blocks share a program, which gets a block's weights and its cache as arguments. So compiling takes as long for 30
blocks as for one, no weight is copied, and a block writes into its cache in place.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from kithara_ray.model.blocks import cached, stack
from kithara_ray.model.causal_lm import CausalLM, Factors, Frozen
from kithara_ray.model.identity import IdentityMap, IdentitySet
from kithara_ray.model.layouts import Layouts
from kithara_ray.sharding.mesh import replicated


class Values:
    """The values of a model's variables, as the programs take them.

    Attributes:
        outer: the values of the variables outside of the blocks.
        blocks: those of each block, in the order of its `variables`.
    """

    def __init__(self, model: CausalLM, factors: Factors, frozen: Frozen):
        value_of = IdentityMap(model.values(factors, frozen, unstack=True))
        self.outer = [value_of[variable] for variable in outer_variables(model)]
        self.blocks = [[value_of[variable] for variable in block.variables] for block in model.chain.blocks]


def outer_variables(model: CausalLM) -> list[keras.Variable]:
    """The variables that no block has."""
    inner = IdentitySet(variable for block in model.chain.blocks for variable in block.variables)
    return [variable for variable in model.model.variables if variable not in inner]


class Programs:
    """The programs of a model that was built with `scan=False`, on any mesh. All processes call them together."""

    def __init__(self, model: CausalLM):
        self._model, self._outer = model, outer_variables(model)
        self._layouts = Layouts(model.mesh)
        cached.rotate_at_positions(model.chain.blocks)
        self._enter = jax.jit(self._before_blocks)
        self._leave = jax.jit(self._behind_blocks, out_shardings=replicated(model.mesh))
        # Arguments of the blocks that are no arrays, by the number of the block: known once `_enter` is traced.
        self._plain: list[dict[str, Any]] = []
        made: dict[tuple[int, int], Any] = {}
        self._block_of = []
        for number, place in enumerate(_places(model.chain)):
            if place not in made:
                made[place] = jax.jit(partial(self._block, number), donate_argnames="cache")
            self._block_of.append(made[place])
        self.blocks = list(made.values())

    def prompts(
        self, values: Values, ids_BT: np.ndarray, lengths_B: np.ndarray, length: int
    ) -> tuple[jax.Array, list[cached.Cache]]:
        """Compute the first token (B,) behind each prompt, and the caches (B, K, T, H) of the blocks.

        Args:
            lengths_B: the numbers of the prompts' tokens.
            length: the number of tokens that a row may have at the end; some rotations depend on it.
        """
        place = self._layouts.rows_of
        segments = (np.arange(ids_BT.shape[1]) < lengths_B[:, None]).astype(np.int32)
        ids, segments, last = place(ids_BT), place(segments), place(lengths_B - 1)
        x, caches = self._through(values, ids, segments, None, [None] * len(self._block_of), length)
        return self._leave(values.outer, ids, segments, x, last), caches

    def step(
        self, values: Values, tokens_B: jax.Array, positions_B: np.ndarray, caches: list, length: int
    ) -> jax.Array:
        """Compute the token (B,) behind each row's token, which is at these positions; update the caches in place."""
        x, caches[:] = self._through(values, tokens_B, None, self._layouts.rows_of(positions_B), caches, length)
        return self._leave(values.outer, tokens_B, None, x, None)

    def _through(self, values: Values, ids_BT, segments_BT, positions_B, caches: Sequence, length: int):
        x, given = self._enter(values.outer, ids_BT, segments_BT, positions_B)
        made, after = {}, []
        for number, program in enumerate(self._block_of):
            plain = self._plain[number].items()
            shared = {name: made[value.block] for name, value in plain if isinstance(value, stack.KeysOf)}
            own, inputs = values.blocks[number], given[number] | shared
            x, keys, cache = program(own, x, inputs, np.int32(length), cache=caches[number], positions=positions_B)
            if keys:
                (made[number],) = keys
            after.append(cache)
        return x, after

    def _before_blocks(self, outer, ids_BT, segments_BT, positions_B):
        with self._bound(outer):
            first, arguments, _ = self._around(ids_BT, segments_BT, positions_B)
        arrays = [{n: v for n, v in each.items() if isinstance(v, jax.Array)} for each in arguments]
        self._plain = [{n: v for n, v in each.items() if not isinstance(v, jax.Array)} for each in arguments]
        return self._layouts.rows(first), arrays

    def _block(self, number: int, values, x_BTD, given, length, *, cache, positions):
        """Compute a block's output, keys and values that later blocks read, if any, and the cache."""
        how = cached.Prompts(length) if positions is None else cached.Step(length, cache, positions)
        block, arguments = self._model.chain.blocks[number], self._plain[number] | given
        with keras.StatelessScope(list(zip(block.variables, values, strict=True))), cached.decoding(how):
            (output, *keys), _ = stack.block_outputs(block, x_BTD, arguments, ())
        after = cached.Cache(*map(self._layouts.rows_and_heads, how.cache))
        return self._layouts.rows(output), [self._layouts.rows(array) for array in keys], after

    def _behind_blocks(self, outer, ids_BT, segments_BT, x_BTD, last_B):
        """Compute the most likely token (B,) behind each row's token at `last_B`; None is the only one of a step."""
        if last_B is not None:
            ids_BT, segments_BT, x_BTD = (
                jnp.take_along_axis(array, last_B.reshape(-1, *[1] * (array.ndim - 1)), axis=1)
                for array in (ids_BT, segments_BT, x_BTD)
            )
        with self._bound(outer):
            *_, finish = self._around(ids_BT, segments_BT, last_B)
            hidden = finish(self._layouts.rows(x_BTD))
            logits = self._model.model.backbone.token_embedding(hidden, reverse=True)
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

    def _bound(self, outer) -> keras.StatelessScope:
        return keras.StatelessScope(state_mapping=list(zip(self._outer, outer, strict=True)))

    def _around(self, ids, segments_BT, positions_B):
        """See `stack.around`. A step has ids (B,) and no segments; prompts have ids (B, T) and no positions."""
        ids_BT = ids[:, None] if ids.ndim == 1 else ids
        places = 0 if positions_B is None else positions_B[:, None]
        given = {
            "token_ids": ids_BT,
            "padding_mask": jnp.ones_like(ids_BT) if segments_BT is None else segments_BT,
            "position_ids": jnp.broadcast_to(places + jnp.arange(ids_BT.shape[1]), ids_BT.shape),
        }
        backbone = self._model.model.backbone
        inputs = {symbolic.name: given[symbolic.name] for symbolic in backbone.inputs}
        return stack.around(backbone, self._model.chain, inputs)


def _places(chain: stack.Chain) -> list[tuple[int, int]]:
    """The section of each block and its place in the section's period; blocks of one place are alike."""
    sections = enumerate(chain.sections)
    return [(number, at % section.period) for number, section in sections for at in range(len(section.blocks))]
