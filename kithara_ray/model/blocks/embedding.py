"""Embedding lookup in a table that is split over its vocabulary.

    B  rows of a data group    T  positions    C  positions of a chunk    V  vocabulary    D  hidden width
    n  devices of a data group

By default, XLA makes every device look up all tokens of the group in its own part of the vocabulary, and sums the
results. Each device then holds (B, T, D) of all rows, and also the summands. A larger slice does not reduce that.

This module has two other ways. The first turns the table, so that each device has D/n of every token, and then turns
the vectors it found. It moves (V + B T) D / n elements. If that exceeds B T D, as with few tokens, the second way
applies. It looks tokens up as XLA does, but one chunk of positions at a time. Each row's sum goes to the devices that
hold the row.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import keras
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kithara_ray.sharding.mesh import BATCH_AXES, GATHERED_AXES, WEIGHT_AXES

LookUp = Callable[[jax.Array], jax.Array]

# Limit of elements in one lookup, 64 MiB of bfloat16, unless one position of all rows has more.
_CHUNK_ELEMENTS = 2**25


def install(layer: keras.layers.Layer, mesh: Mesh) -> None:
    """Make this embedding look up its tokens in these ways; a head that shares the table stays as it is."""
    ways = math.prod(mesh.shape[axis] for axis in WEIGHT_AXES)
    if ways == 1 or layer.input_dim % ways:
        return
    original = layer.call
    turned, in_parts = _turned(layer, mesh), _in_parts(layer, mesh)

    def call(inputs, reverse=False):
        if reverse:
            return original(inputs, reverse=True)
        if inputs.ndim != 2:
            return original(inputs)
        rows, positions = inputs.shape
        tokens = rows * positions // mesh.shape["data"]
        if layer.output_dim % ways == 0 and layer.input_dim + tokens < tokens * ways:
            return turned(inputs)
        return original(inputs) if rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES) else in_parts(inputs)

    layer.call = call


def _turned(layer: keras.layers.Layer, mesh: Mesh) -> LookUp:
    original = layer.call

    def split(array, *spec):
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))

    def look_up(ids_BT):
        # Move one axis at a time, the last one of a dim first: XLA then uses all-to-alls instead of gathering all.
        table_VD = split(split(layer.embeddings.value, GATHERED_AXES, "tensor"), None, ("tensor", *GATHERED_AXES))
        with keras.StatelessScope(state_mapping=[(layer.embeddings, table_VD)]):
            found_BTD = original(split(ids_BT, "data"))
        return split(split(found_BTD, "data", None, ("tensor", *GATHERED_AXES)), BATCH_AXES, None, "tensor")

    return look_up


def _in_parts(layer: keras.layers.Layer, mesh: Mesh) -> LookUp:
    part = layer.input_dim // math.prod(mesh.shape[axis] for axis in WEIGHT_AXES)

    def on_one_device(table_VD, ids_BT):
        first = jax.lax.axis_index(WEIGHT_AXES) * part

        def look_up(ids_BC):
            own = ids_BC - first
            # Use the precision of the products, as the layer does.
            found_BCD = jnp.take(table_VD, own, axis=0, mode="clip").astype(layer.compute_dtype)
            found_BCD = jnp.where(((own >= 0) & (own < part))[..., None], found_BCD, 0)
            return jax.lax.psum(jax.lax.psum_scatter(found_BCD, GATHERED_AXES, tiled=True), "tensor")

        rows, positions = ids_BT.shape
        chunk = _chunk_length(positions, _CHUNK_ELEMENTS // (rows * layer.output_dim))
        if chunk == positions:
            return look_up(ids_BT)
        found = jax.lax.map(look_up, jnp.moveaxis(ids_BT.reshape(rows, -1, chunk), 1, 0))
        return jnp.moveaxis(found, 0, 1).reshape(found.shape[1], positions, -1)

    split = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(PartitionSpec(WEIGHT_AXES), PartitionSpec("data")),
        out_specs=PartitionSpec(BATCH_AXES),
    )
    return lambda ids_BT: split(layer.embeddings.value, ids_BT)


def _chunk_length(positions: int, bound: int) -> int:
    """The largest divisor within `bound`; all positions if no divisor comes near: TPU lengths are multiples of 128."""
    longest = max(c for c in range(1, positions + 1) if positions % c == 0 and c <= max(1, bound))
    return longest if 2 * longest > bound else positions
