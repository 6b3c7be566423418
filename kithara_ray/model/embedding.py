"""Looking up embeddings in a table that is split over its vocabulary.

    B  rows    T  positions    V  vocabulary    D  hidden width    n  devices of a data group

As XLA partitions it by itself, every device looks up all tokens of the group in its own part of the vocabulary and the
results are summed: (B, T, D) of all rows stands on each device, which no longer slice makes smaller. Here the table is
turned, each device having D/n of every token, then the found vectors are: (V + B T) D / n elements are moved.
"""

import keras
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def install(layer: keras.layers.Layer, mesh: Mesh) -> None:
    """Make this embedding turn its table where that moves less; a head that shares the table is left alone."""
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    if ways == 1 or layer.output_dim % ways:
        return
    original = layer.call

    def call(inputs, reverse=False):
        tokens = inputs.shape[0] * inputs.shape[1] // mesh.shape["data"] if inputs.ndim == 2 else 0
        # An all-reduce moves its array twice.
        if reverse or layer.input_dim + tokens > 2 * tokens * ways:
            return original(inputs, reverse=reverse)
        table_VD = layer._embeddings.value
        turned_VD = with_sharding_constraint(table_VD, NamedSharding(mesh, PartitionSpec(None, ("fsdp", "tensor"))))
        ids_BT = with_sharding_constraint(inputs, NamedSharding(mesh, PartitionSpec("data")))
        with keras.StatelessScope(state_mapping=[(layer._embeddings, turned_VD)]):
            found_BTD = original(ids_BT)
        return with_sharding_constraint(found_BTD, NamedSharding(mesh, PartitionSpec("data", None, ("fsdp", "tensor"))))

    layer.call = call
