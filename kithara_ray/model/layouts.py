"""The layout of activations and caches while weights that are split stay in place.

A decoding step handles one token per row, so its activations are far smaller than the weights. The activations
therefore go to the weights. Every linear layer gets the rows of all `fsdp` and `tensor` devices. Each device computes
the part of the output that its part of the weight gives. The output is then split by rows again, like the cache. No
device ever holds a whole weight.
"""

import math
from collections.abc import Callable

import jax
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kithara_ray.model import keras_compat
from kithara_ray.model.causal_lm import CausalLM
from kithara_ray.model.identity import IdentityMap
from kithara_ray.sharding.mesh import BATCH_AXES, batch_sharding, from_parts, split_on


class Layouts:
    """Constraints on the arrays of a mesh; on one device they change nothing."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    @property
    def ways(self) -> int:
        """The number of parts that rows are split into."""
        return math.prod(self._mesh.shape[axis] for axis in BATCH_AXES)

    def rows_of(self, array: np.ndarray) -> jax.Array | np.ndarray:
        """An array (B, ...) of which every process has all rows, as the global array split by rows."""
        if self._mesh.size == 1:
            return array
        return from_parts(array.shape, batch_sharding(self._mesh), array.__getitem__)

    def rows(self, array: jax.Array) -> jax.Array:
        """Split (B, ...) by rows."""
        return self.constrain(array, BATCH_AXES)

    def rows_and_heads(self, kept_BKSH: jax.Array) -> jax.Array:
        """Split keys or values by rows, and by heads if `tensor` divides them."""
        divides = kept_BKSH.shape[1] % self._mesh.shape["tensor"] == 0
        return self.constrain(kept_BKSH, BATCH_AXES, "tensor" if divides else None)

    def constrain(self, array: jax.Array, *spec) -> jax.Array:
        """Split the first dims as this specification says."""
        if self._mesh.size == 1:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(self._mesh, PartitionSpec(*spec)))


def keep_weights_in_place(model: CausalLM) -> None:
    """Wrap the layers of a model on several devices so that its weights never move; it must have no other use."""
    layouts = Layouts(model.mesh)
    split_of = IdentityMap(
        (slot.ports[0].variable, split_on(model.mesh, model.weight_sharding(slot))) for slot in model.slots
    )
    for layer in keras_compat.all_layers(model.model.backbone):
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
            _wrap(layer, layouts, _output_split(layer, split_of.get(layer.kernel, ())))

    embedding = model.model.backbone.token_embedding
    look_up = embedding.call

    def call(inputs, reverse=False):
        if not reverse:
            return layouts.rows(layouts.constrain(look_up(inputs), "data"))
        logits = look_up(layouts.constrain(inputs, "data"), reverse=True)
        return layouts.constrain(logits, "data", *[None] * (logits.ndim - 2), model.vocabulary_axes)

    embedding.call = call


def _wrap(layer: keras.layers.Layer, layouts: Layouts, output_split: tuple) -> None:
    inner: Callable = layer.call

    def call(inputs, *args, **kwargs):
        # Take the layout that the weight's part gives first; for a layout by rows only, XLA would gather the weight.
        output = inner(layouts.constrain(inputs, "data"), *args, **kwargs)
        # A router gets rows and positions as one dim.
        between = [None] * (output.ndim - 1 - len(output_split))
        return layouts.rows(layouts.constrain(output, "data", *between, *output_split))

    layer.call = call


def _output_split(layer: keras.layers.Layer, kernel_split: tuple) -> tuple:
    """Split of the last dims of a linear layer's output, given its kernel's split."""
    if isinstance(layer, keras.layers.Dense):
        return (kernel_split[1] if kernel_split else None,)
    kernel, output = layer.equation.split(",")[1].split("->")
    split = dict(zip(kernel, kernel_split, strict=True)) if kernel_split else {}
    return tuple(split.get(label) for label in output[1:])
