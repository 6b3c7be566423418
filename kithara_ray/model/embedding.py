"""Looking up embeddings in a table that is split over its vocabulary.

    B  rows    T  positions    V  vocabulary    D  hidden width    n  devices of a data group

As XLA partitions it by itself, every device looks up all tokens of the group in its own part of the vocabulary and the
results are summed: (B, T, D) of all rows stands on each device, which no larger slice makes smaller. Here the table is
turned, so that each device has D/n of every token, then the found vectors are: (V + B T) D / n elements are moved. That
is done where a group has more tokens than the vocabulary: before, XLA's way is smaller in memory.
"""

import keras
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kithara_ray.sharding.mesh import BATCH_AXES


def install(layer: keras.layers.Layer, mesh: Mesh) -> None:
    """Make this embedding turn its table where the tokens outnumber it; a head that shares the table is left alone."""
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    if ways == 1 or layer.input_dim % ways or layer.output_dim % ways:
        return
    original = layer.call

    def split(array, *spec):
        return with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))

    def call(inputs, reverse=False):
        tokens = inputs.shape[0] * inputs.shape[1] // mesh.shape["data"] if inputs.ndim == 2 else 0
        if reverse or tokens < layer.input_dim:
            return original(inputs, reverse=reverse)
        # One axis at a time, the last one of a dim first: XLA does these by all-to-alls, others by gathering all.
        table_VD = split(split(layer._embeddings.value, "fsdp", "tensor"), None, ("tensor", "fsdp"))
        with keras.StatelessScope(state_mapping=[(layer._embeddings, table_VD)]):
            found_BTD = original(split(inputs, "data"))
        return split(split(found_BTD, "data", None, ("tensor", "fsdp")), BATCH_AXES, None, "tensor")

    layer.call = call
