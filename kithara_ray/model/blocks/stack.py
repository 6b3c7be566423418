"""Equal decoder blocks as one scan over stacked weights, each block rematerialised.

A KerasHub backbone is a functional graph: inputs, some layers, a chain of decoder blocks, some layers. This module
finds the chain in the graph and runs it as `lax.scan`: one compiled body at any depth. Blocks that differ in
configuration (gemma's sliding and global pairs) form a period of more than one block. Leftover blocks run after the
scan.

For long rows, a block runs in parts: its attention over all positions, then the rest over chunks of positions. In the
rest, no position looks at another. The block's widest arrays, those inside its MLP, exist for one chunk at a time.

    N  blocks of the model    P  blocks of a period    S = N // P  steps of the scan
    B  rows    T  positions    C  positions of a chunk    D  hidden width
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import keras

from kithara_ray.errors import UnsupportedError
from kithara_ray.model import keras_compat
from kithara_ray.model.blocks import attention
from kithara_ray.model.blocks.dropout import dropping
from kithara_ray.model.identity import IdentityMap
from kithara_ray.model.options import groups_of

Gather = Callable[[keras.Variable, jax.Array], jax.Array]

_POLICIES = {
    "block": None,
    "attention": jax.checkpoint_policies.save_only_these_names(attention.RESIDUALS),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(attention.INPUTS, attention.RESIDUALS),
    ),
    "nested": None,
}

# Attributes that LoRA sets on a layer and that differ between otherwise equal layers.
_OWN_NAMES = ("lora_number",)


@dataclass(frozen=True)
class Chain:
    """The decoder blocks of a backbone.

    Attributes:
        blocks: the N blocks in order.
        period: P, the smallest for which block i equals block i - P.
    """

    blocks: tuple[keras.layers.Layer, ...]
    period: int

    @property
    def steps(self) -> int:
        return len(self.blocks) // self.period

    def peers(self) -> IdentityMap[keras.Variable, tuple[keras.Variable, ...]]:
        """Map every variable of the scanned blocks to the same variable of every step."""
        scanned = self.blocks[: self.steps * self.period]
        groups = (
            group
            for place in range(self.period)
            for group in zip(*(block.variables for block in scanned[place :: self.period]), strict=True)
        )
        return IdentityMap((variable, group) for group in groups for variable in group)


def find_chain(backbone: keras.Model) -> Chain:
    """Find the backbone's decoder blocks and their period.

    Raises:
        UnsupportedError: the backbone has no `transformer_layers`.
    """
    blocks = tuple(getattr(backbone, "transformer_layers", ()))
    if not blocks:
        raise UnsupportedError(f"{type(backbone).__name__} keeps its decoder blocks in a place that is not known")
    kinds = [_kind(block) for block in blocks]
    period = next(p for p in range(1, len(blocks) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))
    return Chain(blocks, period)


def _kind(block: keras.layers.Layer) -> str:
    """Key that two blocks share if one program fits both: settings of all layers, shapes of all variables."""
    layers = [_settings(layer) for layer in keras_compat.all_layers(block)]
    return json.dumps([layers, [tuple(variable.shape) for variable in block.variables]], sort_keys=True)


def _settings(layer: keras.layers.Layer) -> list:
    plain = keras_compat.plain_settings(layer)
    return [type(layer).__name__, {name: value for name, value in plain.items() if name not in _OWN_NAMES}]


@dataclass(frozen=True)
class Pass:
    """Inputs and settings of one pass over a chain.

    Attributes:
        values_of: gives the arrays of one block after the scan, in the order of its `variables`.
        scanned: for each place of the period and each variable of its block, an array (S, ...) of all steps.
        gather: converts one variable's value to the one its block computes with, just before the block runs.
        place: puts the activations between blocks into their layout.
        remat: one of `options.REMAT`.
        chunk: C, the result of `options.chunk_length`.
        dropout_key: the key of this pass; None drops nothing. Every block has its own.
    """

    values_of: Callable[[keras.layers.Layer], Sequence[jax.Array]]
    scanned: Sequence[Sequence[jax.Array]]
    gather: Gather
    place: Callable[[jax.Array], jax.Array]
    remat: str
    chunk: int
    dropout_key: jax.Array | None = None


def run(backbone: keras.Model, chain: Chain, inputs: Mapping[str, jax.Array], how: Pass) -> jax.Array:
    """Compute the backbone's output for `inputs`, with its chain scanned.

    Args:
        inputs: arrays by the names of the backbone's inputs. Variables outside the chain must be bound already.
    """
    first, last = chain.blocks[0], chain.blocks[-1]
    known = IdentityMap((symbolic, inputs[symbolic.name]) for symbolic in backbone.inputs)
    for node in keras_compat.nodes_of(backbone):
        if node.is_input or (node.operation in chain.blocks and node.operation is not first):
            continue
        args, kwargs = keras_compat.arguments_of(node, known)
        outputs = node.outputs
        if node.operation is first:
            result = _run_chain(chain, args[0], kwargs, how)
            # A block may also return its keys and values for other blocks; no block here takes them.
            outputs = [keras_compat.first_output_of(last)]
        else:
            result = node.operation(*args, **kwargs)
        for symbolic, value in zip(outputs, keras.tree.flatten(result), strict=True):
            known[symbolic] = value
    return known[backbone.outputs[0]]


def _run_chain(chain: Chain, x: jax.Array, kwargs: Mapping, how: Pass) -> jax.Array:
    place = how.place

    def call(block, x, values, key):
        own = zip(block.variables, values, strict=True)
        pairs = [(variable, how.gather(variable, value)) for variable, value in own]
        with keras.StatelessScope(state_mapping=pairs), dropping(key):
            if how.chunk == x.shape[1]:
                return place(_output(block, x, kwargs))
            return place(_in_chunks(block, x, kwargs, how.chunk, place, key))

    def rematerialised(block, *operands):
        return jax.checkpoint(functools.partial(call, block), policy=_POLICIES[how.remat])(*operands)

    def body(x, step):
        values, key = step
        for block, own in zip(chain.blocks[: chain.period], values, strict=True):
            x = rematerialised(block, x, own, key)
        return x, None

    behind = chain.blocks[chain.steps * chain.period :]
    keys, last_key = None, None
    if how.dropout_key is not None:
        *keys, last_key = jax.random.split(how.dropout_key, chain.steps + 1)
        keys = jnp.stack(keys)
    groups = groups_of(chain.steps) if how.remat == "nested" else 1
    x = _scan_in_groups(body, place(x), (how.scanned, keys), groups)
    for block in behind:
        x = rematerialised(block, x, how.values_of(block), last_key)
    return x


def _output(block: keras.layers.Layer, x: jax.Array, kwargs: Mapping) -> jax.Array:
    return keras.tree.flatten(block(x, **kwargs))[0]


def _in_chunks(block, x_BTD, kwargs: Mapping, chunk: int, place, key: jax.Array | None) -> jax.Array:
    """Compute the block's output; after attention, one chunk of positions at a time, each rematerialised."""
    with attention.recorded() as outputs:
        # Only the output of attention is used from this trace.
        _output(block, x_BTD, kwargs)
    (attended_BTNH,) = outputs
    rows, positions = x_BTD.shape[:2]

    def is_of_positions(value) -> bool:
        return getattr(value, "shape", ())[:2] == (rows, positions)

    def split(array):
        return jnp.moveaxis(array.reshape(rows, positions // chunk, chunk, *array.shape[2:]), 1, 0)

    @jax.checkpoint
    def rest(number, x_BCD, attended_BCNH, sliced):
        own_key = None if key is None else jax.random.fold_in(key, number)
        with attention.given(attended_BCNH), dropping(own_key):
            return place(_output(block, place(x_BCD), {**kwargs, **sliced}))

    of_positions = {name: split(value) for name, value in kwargs.items() if is_of_positions(value)}
    parts = jnp.arange(positions // chunk), split(x_BTD), split(attended_BTNH), of_positions
    out = jax.lax.map(lambda part: rest(*part), parts)
    return jnp.moveaxis(out, 0, 1).reshape(x_BTD.shape)


def _scan_in_groups(body, x, steps, groups: int) -> jax.Array:
    """Run `lax.scan` over the steps; with several groups, keep only each group's inputs."""
    if groups == 1:
        return jax.lax.scan(body, x, steps)[0]

    @jax.checkpoint
    def group(x, part):
        return jax.lax.scan(body, x, part)[0]

    grouped = jax.tree.map(lambda array: array.reshape(groups, array.shape[0] // groups, *array.shape[1:]), steps)
    return jax.lax.scan(lambda x, part: (group(x, part), None), x, grouped)[0]
