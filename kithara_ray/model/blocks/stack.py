"""Equal decoder blocks as one scan over stacked weights, each block rematerialised.

A KerasHub backbone is a functional graph: inputs, some layers, a chain of decoder blocks, some layers. This module
finds the chain in the graph and runs it as `lax.scan`: one compiled body at any depth. Blocks that differ in
configuration (gemma's sliding and global pairs) form a period of more than one block. Leftover blocks run after the
scan. Later blocks of another kind form a second scan: gemma4's attend to keys and values of earlier blocks, which the
first scan carries along.

For long rows, a block runs in parts: its attention over all positions, then the rest over chunks of positions. In the
rest, no position looks at another. The block's widest arrays, those inside its MLP, exist for one chunk at a time.

    N  blocks of a section    P  blocks of a period    S = N // P  steps of the scan
    B  rows    T  positions    C  positions of a chunk    D  hidden width
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax.ad_checkpoint import checkpoint_name

from kithara_ray.errors import UnsupportedError
from kithara_ray.model import keras_compat
from kithara_ray.model.blocks import attention, balance, experts
from kithara_ray.model.blocks.dropout import dropping
from kithara_ray.model.blocks.kept import INPUT, POLICIES
from kithara_ray.model.identity import IdentityMap
from kithara_ray.model.options import OFFLOAD, groups_of

Gather = Callable[[keras.Variable, Any], jax.Array]

# Attributes that LoRA sets on a layer and that differ between otherwise equal layers.
_OWN_NAMES = ("lora_number",)


@dataclass(frozen=True)
class Section:
    """Consecutive decoder blocks that run as one scan, and then the blocks that are left over.

    Attributes:
        blocks: the blocks in order.
        period: P, the smallest for which block i equals block i - P.
    """

    blocks: tuple[keras.layers.Layer, ...]
    period: int

    @property
    def steps(self) -> int:
        return len(self.blocks) // self.period

    @property
    def scanned(self) -> tuple[keras.layers.Layer, ...]:
        return self.blocks[: self.steps * self.period]

    @property
    def left(self) -> tuple[keras.layers.Layer, ...]:
        return self.blocks[self.steps * self.period :]


@dataclass(frozen=True)
class Chain:
    """The decoder blocks of a backbone.

    Attributes:
        sections: one, or two if the later blocks differ from the earlier ones, as gemma4's that share keys do.
    """

    sections: tuple[Section, ...]

    @property
    def blocks(self) -> tuple[keras.layers.Layer, ...]:
        """The N blocks in order."""
        return tuple(block for section in self.sections for block in section.blocks)

    @property
    def periods(self) -> tuple[int, ...]:
        return tuple(section.period for section in self.sections)

    @property
    def steps(self) -> int:
        """Steps of all scans."""
        return sum(section.steps for section in self.sections)

    def peers(self) -> IdentityMap[keras.Variable, tuple[keras.Variable, ...]]:
        """Map every variable of the scanned blocks to the same variable of every step."""
        groups = (
            group
            for section in self.sections
            for place in range(section.period)
            for group in zip(*(block.variables for block in section.scanned[place :: section.period]), strict=True)
        )
        return IdentityMap((variable, group) for group in groups for variable in group)


def find_chain(backbone: keras.Model) -> Chain:
    """Find the backbone's decoder blocks and their periods.

    Raises:
        UnsupportedError: the backbone has no `transformer_layers`.
    """
    blocks: tuple[keras.layers.Layer, ...] = tuple(getattr(backbone, "transformer_layers", ()))
    if not blocks:
        raise UnsupportedError(f"{type(backbone).__name__} keeps its decoder blocks in an unknown place")
    numbers: dict[str, int] = {}
    kinds = [numbers.setdefault(_kind(block), len(numbers)) for block in blocks]
    ways = [[blocks], *([blocks[:cut], blocks[cut:]] for cut in range(1, len(blocks)))]

    def sections(parts: Sequence[tuple]) -> list[Section]:
        starts = [sum(map(len, parts[:number])) for number in range(len(parts))]
        return [Section(part, _period(kinds[s : s + len(part)])) for part, s in zip(parts, starts, strict=True)]

    # The fewest blocks to compile; of equal ways the first, which is one section.
    found = min(map(sections, ways), key=lambda made: sum(one.period + len(one.left) for one in made))
    return Chain(tuple(found))


def _period(kinds: Sequence[int]) -> int:
    return next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))


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
        scanned: for each section, each place of its period and each variable of its block, an array (S, ...) of all
            steps.
        gather: converts one variable's value to the one its block computes with, just before the block runs.
        place: puts the activations between blocks into their layout.
        remat: one of `options.REMAT`.
        chunk: C, the result of `options.chunk_length`.
        dropout_key: the key of this pass; None drops nothing. Every block has its own.
        measures: names of the measures of mixtures' loads, see `balance`; none by default.
    """

    values_of: Callable[[keras.layers.Layer], Sequence[Any]]
    scanned: Sequence[Sequence[Sequence[Any]]]
    gather: Gather
    place: Callable[[jax.Array], jax.Array]
    remat: str
    chunk: int
    dropout_key: jax.Array | None = None
    measures: Collection[str] = ()


@dataclass(frozen=True)
class KeysOf:
    """A stand-in for the keys and values of a block, which it returns besides its output, for later blocks."""

    block: int


# A stand-in for a block's output, before the chain has run.
_LATER = object()


def run(
    backbone: keras.Model, chain: Chain, inputs: Mapping[str, jax.Array], how: Pass
) -> tuple[jax.Array, list[balance.Load]]:
    """Compute the backbone's output for `inputs`, with its chain scanned, and the loads of its mixtures.

    Args:
        inputs: arrays by the names of the backbone's inputs. Variables outside the chain must be bound already.

    Returns:
        the output, and for the mixtures in their order the measures (mixtures, B, E), in one or more parts.
    """
    first, arguments, finish = around(backbone, chain, inputs)
    last, loads = _run_chain(chain, first, arguments, how)
    return finish(last), loads


Around = tuple[jax.Array, list[dict[str, Any]], Callable[[jax.Array], jax.Array]]


def around(backbone: keras.Model, chain: Chain, inputs: Mapping[str, jax.Array]) -> Around:
    """Return the first block's input, each call's keyword arguments, and a function from the last block to the end."""
    known: IdentityMap[Any, Any] = IdentityMap((symbolic, inputs[symbolic.name]) for symbolic in backbone.inputs)
    nodes = [node for node in keras_compat.nodes_of(backbone) if not node.is_input]
    number_of = IdentityMap((block, number) for number, block in enumerate(chain.blocks))
    calls = {number_of[node.operation]: node for node in nodes if node.operation in number_of}
    for number, node in calls.items():
        known |= IdentityMap(zip(node.outputs, [_LATER, KeysOf(number)], strict=False))
    others = [node for node in nodes if node.operation not in number_of]
    behind = [node for node in others if not _compute(node, known)]
    arguments = [keras_compat.arguments_of(calls[number], known) for number in range(len(calls))]

    def finish(last: jax.Array) -> jax.Array:
        known[calls[len(calls) - 1].outputs[0]] = last
        for node in behind:
            _compute(node, known)
        return known[backbone.outputs[0]]

    return arguments[0][0][0], [kwargs for _, kwargs in arguments], finish


def _compute(node, known: IdentityMap) -> bool:
    """Compute a node of the graph; False if it needs a result of the chain, which has not run."""
    if any(known.get(symbolic, _LATER) is _LATER for symbolic in node.input_tensors):
        return False
    args, kwargs = keras_compat.arguments_of(node, known)
    result = node.operation(*args, **kwargs)
    for symbolic, value in zip(node.outputs, keras.tree.flatten(result), strict=True):
        known[symbolic] = value
    return True


def _run_chain(
    chain: Chain, x: jax.Array, kwargs: Sequence[Mapping], how: Pass
) -> tuple[jax.Array, list[balance.Load]]:
    """Compute the last block's output, and all loads; `kwargs` are those of each block's call."""
    read = {value.block for each in kwargs for value in each.values() if isinstance(value, KeysOf)}
    kept: dict[int, jax.Array] = {}
    loads: list[balance.Load] = []
    start = 0
    for place, section in enumerate(chain.sections):
        stop = start + len(section.blocks)
        key = how.dropout_key
        key = key if key is None or not place else jax.random.fold_in(key, place)
        own = dataclasses.replace(how, scanned=how.scanned[place : place + 1], dropout_key=key)
        x, new, more = _run_section(section, start, x, kwargs[start:stop], read, kept, own)
        kept |= new
        loads += more
        start = stop
    return x, loads


def _run_section(
    section: Section,
    start: int,
    x: jax.Array,
    kwargs: Sequence[Mapping],
    read: Collection[int],
    kept: Mapping[int, jax.Array],
    how: Pass,
) -> tuple[jax.Array, dict[int, jax.Array], list[balance.Load]]:
    """Compute the section's output, the keys and values of those of its blocks that later blocks read, and the loads.

    Args:
        start: the number of the section's first block.
        read: the numbers of all blocks whose keys and values are read.
        kept: keys and values of blocks before the section.
        how: the pass over this section alone, with its own dropout key.
    """
    (scanned,), dropout_key = how.scanned, how.dropout_key
    place, period, steps = how.place, section.period, section.steps

    def call(block, with_keys, given, x, values, key):
        if how.remat == OFFLOAD:
            x = checkpoint_name(x, INPUT)
        own = zip(block.variables, values, strict=True)
        pairs = [(variable, how.gather(variable, value)) for variable, value in own]
        with keras.StatelessScope(state_mapping=pairs), dropping(key):
            if how.chunk == x.shape[1]:
                (output, *keys), loads = block_outputs(block, x, given, how.measures)
            else:
                (output, *keys), loads = _in_chunks(block, x, given, how, key)
        return place(output), [place(array) for array in keys[:with_keys]], jax.tree.map(place, loads)

    def rematerialised(block, with_keys, x, values, key, given, kept):
        given = {name: kept[v.block] if isinstance(v, KeysOf) else v for name, v in given.items()}
        run = functools.partial(call, block, with_keys, given)
        return jax.checkpoint(run, policy=POLICIES[how.remat])(x, values, key)

    same, different = zip(*(_common(kwargs[at : steps * period : period]) for at in range(period)), strict=True)
    last_key, keys = None, None
    if dropout_key is not None:
        *keys, last_key = jax.random.split(dropout_key, steps + 1)
        keys = jnp.stack(keys)
    # Number of the step whose block at this place is read by later ones.
    wanted = {number % period: number // period for number in range(steps * period) if start + number in read}

    def body(carry, step):
        x, own = carry
        values, key, given, number = step
        loads: list[balance.Load] = []
        for at, block in enumerate(section.blocks[:period]):
            x, keys, new = rematerialised(block, at in wanted, x, values[at], key, {**same[at], **given[at]}, kept)
            loads += new
            if at in wanted:
                own = own | {at: jnp.where(number == wanted[at], keys[0], own[at])}
        return (x, own), balance.stacked(loads)

    xs = scanned, keys, different, jnp.arange(steps)
    x, own = place(x), {}
    if wanted:
        one = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), xs)
        empty = dict.fromkeys(wanted, jnp.zeros(()))
        shapes = _shapes_of_keys(body, x, empty, one)
        own = {at: place(jnp.zeros(shape.shape, shape.dtype)) for at, shape in shapes.items()}
    groups = groups_of(steps) if how.remat == "nested" else 1
    (x, own), loads = _scan_in_groups(body, (x, own), xs, groups)
    # The steps of the scan, and the mixtures of one step.
    parts = [jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), loads)] if loads else []
    made = {start + wanted[at] * period + at: array for at, array in own.items()}
    for number, block in enumerate(section.left, start=steps * period):
        with_keys = start + number in read
        values, given = how.values_of(block), kwargs[number]
        x, keys, new = rematerialised(block, with_keys, x, values, last_key, given, {**kept, **made})
        parts += [balance.stacked(new)] if new else []
        if with_keys:
            made[start + number] = keys[0]
    return x, made, parts


def _shapes_of_keys(body, x, empty: Mapping[int, jax.Array], one) -> Mapping[int, jax.ShapeDtypeStruct]:
    """Shapes of the keys and values that a scan carries: a scalar's place takes theirs by broadcasting."""
    (_, own), _ = jax.eval_shape(lambda step: body((x, empty), step), one)
    return own


def _common(kwargs: Sequence[Mapping]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Split the arguments of one place's calls: those that all steps share, and the others, stacked by step."""
    same, different = {}, {}
    for name, first in kwargs[0].items():
        values = [each[name] for each in kwargs]
        if all(value is first or (isinstance(first, KeysOf) and value == first) for value in values):
            same[name] = first
        else:
            different[name] = jnp.stack(values)
    return same, different


def block_outputs(
    block: keras.layers.Layer, x: jax.Array, kwargs: Mapping, measures: Collection[str]
) -> tuple[list[jax.Array], list[balance.Load]]:
    """The block's output, and its keys and values if it returns them; and the loads of its mixtures."""
    with experts.padded(attention.segments_in(kwargs)), balance.recorded(measures) as loads:
        return keras.tree.flatten(block(x, **kwargs)), loads


def _in_chunks(
    block, x_BTD, kwargs: Mapping, how: Pass, key: jax.Array | None
) -> tuple[list[jax.Array], list[balance.Load]]:
    """Compute the same; after attention, one chunk of positions at a time, each rematerialised."""
    chunk, place = how.chunk, how.place
    with attention.recorded() as outputs:
        # Only the output of attention, and keys and values, are used from this trace.
        (_, *keys), _ = block_outputs(block, x_BTD, kwargs, ())
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
            (out, *_), loads = block_outputs(block, place(x_BCD), {**kwargs, **sliced}, how.measures)
        return place(out), jax.tree.map(place, loads)

    of_positions = {name: split(value) for name, value in kwargs.items() if is_of_positions(value)}
    parts = jnp.arange(positions // chunk), split(x_BTD), split(attended_BTNH), of_positions
    out, loads = jax.lax.map(lambda part: rest(*part), parts)
    loads = jax.tree.map(lambda array: jnp.sum(array, axis=0), loads)
    return [jnp.moveaxis(out, 0, 1).reshape(x_BTD.shape), *keys], loads


def _scan_in_groups(body, x, steps, groups: int) -> tuple[Any, Any]:
    """Run `lax.scan` over the steps; with several groups, keep only each group's inputs."""
    if groups == 1:
        return jax.lax.scan(body, x, steps)

    @jax.checkpoint
    def group(x, part):
        return jax.lax.scan(body, x, part)

    grouped = jax.tree.map(lambda array: array.reshape(groups, array.shape[0] // groups, *array.shape[1:]), steps)
    x, found = jax.lax.scan(group, x, grouped)
    return x, jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), found)
