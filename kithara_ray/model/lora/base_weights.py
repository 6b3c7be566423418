"""Base weights trained besides the factors: biases, some rows of embedding and head, or these two as a whole.

    K  trained tokens    V  vocabulary    D  hidden width

The trained arrays match an adapter's file: float32 values in the layout of Hugging Face's tensor. They replace the
weights' values when the model computes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kithara_ray.errors import UnsupportedError
from kithara_ray.hf import beside
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.families.ports import Port
from kithara_ray.model.identity import IdentityMap
from kithara_ray.model.weights.layout import Layout, layout_of
from kithara_ray.model.weights.slots import Slot


@dataclass(frozen=True)
class BaseSlot:
    """One trained array: a weight of the base, or the same weight of several scan steps, stacked.

    Attributes:
        names: adapter tensor names: one, or one for each of these steps.
        number: number of the slot that holds the weight.
        steps: the trained steps of a stacked slot; empty for any other slot.
        one: the shape of one value, as in the adapter's file.
        layout: the position of the weight's elements in its tensor.
        rows: the trained rows; None means all.
        stacked: True if the array's first dim counts the steps.
    """

    names: tuple[str, ...]
    number: int
    steps: tuple[int, ...]
    one: tuple[int, ...]
    layout: Layout
    rows: tuple[int, ...] | None
    stacked: bool

    @property
    def key(self) -> str:
        """The array's name in a state: the name of its first tensor."""
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.names), *self.one) if self.stacked else self.one

    def put(self, weights: jax.Array, value: jax.Array) -> jax.Array:
        """The slot's array with the trained values in place.

        Whole weights become float32. A table with some trained rows keeps its dtype for all rows, as in PEFT.
        """
        if self.rows is not None:
            table_VD = self._to_tensor(weights)
            rows = table_VD.at[jnp.array(self.rows)].set(value.astype(table_VD.dtype), unique_indices=True)
            return self._to_weight(rows)
        if not self.steps:
            return self._to_weight(value)
        values = jax.vmap(self._to_weight)(value if self.stacked else value[None])
        if len(self.steps) == len(weights):
            return values
        return weights.astype(values.dtype).at[jnp.array(self.steps)].set(values)

    def take(self, weights: jax.Array) -> jax.Array:
        """The base's own values of the trained elements, float32."""
        if self.rows is not None:
            return self._to_tensor(weights)[jnp.array(self.rows)].astype(jnp.float32)
        if not self.steps:
            return self._to_tensor(weights).astype(jnp.float32)
        values = jax.vmap(self._to_tensor)(weights[jnp.array(self.steps)]).astype(jnp.float32)
        return values if self.stacked else values[0]

    def _to_weight(self, tensor: jax.Array) -> jax.Array:
        return jnp.transpose(tensor.reshape(self.layout.shape), np.argsort(self.layout.order).tolist())

    def _to_tensor(self, weight: jax.Array) -> jax.Array:
        shape = weight.shape if self.rows is not None else self.one
        turned = jnp.transpose(weight, self.layout.order)
        return turned if self.rows is not None else turned.reshape(shape)

    def spec(self, of_weight: Sequence) -> tuple | None:
        """Derive the array's split from the weight's; None if the array's dims do not correspond to the weight's."""
        if self.rows is not None or self.steps or len(self.one) != len(self.layout.order):
            return None
        return tuple(of_weight[dim] if dim < len(of_weight) else None for dim in self.layout.order)


def base_slots(backbone, slots: Sequence[Slot], config: LoraConfig | None, stack: bool) -> list[BaseSlot]:
    """List the base weights that an adapter of this config trains.

    Args:
        stack: as for `layers.factor_slots`: the same weights of several steps form one array.

    Raises:
        UnsupportedError: such a weight is not read from one tensor, element by element.
    """
    if config is None or not config.has_beside:
        return []
    tables = _tables(backbone, slots)
    trained = {one.tensor: one for one in beside.tables_of(config, [n.removesuffix(beside.WEIGHT) for n in tables])}
    made = []
    for number, slot in enumerate(slots):
        names = [_name(config, port, trained) for port in slot.ports]
        steps = [step for step, name in enumerate(names) if name is not None]
        if not steps:
            continue
        port = slot.ports[steps[0]]
        one = trained.get(port.hf_name)
        whole = _layout(port, tables.get(port.hf_name))
        rows = one.rows if one else None
        shape = whole[0] if rows is None else (len(rows), *whole[0][1:])
        groups = [steps] if stack or not slot.stacked else [[step] for step in steps]
        for group in groups:
            named = tuple(name for step in group if (name := names[step]) is not None)
            own = tuple(group) if slot.stacked else ()
            made.append(BaseSlot(named, number, own, shape, whole[1], rows, len(group) > 1))
    return made


def _tables(backbone, slots: Sequence[Slot]) -> dict[str, tuple[int, int]]:
    """Map the embedding, and the head if it has its own weight, to (V, D)."""
    layer = backbone.token_embedding
    own = [layer.embeddings] if layer.tie_weights else [layer.embeddings, layer.reverse_embeddings]
    name_of = IdentityMap((port.variable, port.hf_name) for slot in slots for port in slot.ports)
    return {name_of[variable]: (layer.input_dim, layer.output_dim) for variable in own}


def _name(config: LoraConfig, port: Port, trained: dict[str, beside.Beside]) -> str | None:
    """The adapter's name for this weight; None if the adapter does not train it."""
    if port.hf_name in trained:
        return trained[port.hf_name].name
    return beside.bias_name(config, port.hf_name) if port.hf_name.endswith(beside.BIAS) else None


def _layout(port: Port, table: tuple[int, int] | None) -> tuple[tuple[int, ...], Layout]:
    """(shape of the tensor, position of the weight's elements in it)."""
    piece = port.pieces[0]
    if len(port.pieces) > 1:
        raise UnsupportedError(
            f"{port.hf_name}: KerasHub holds it with others in one variable, so it cannot be trained separately"
        )
    shape: tuple[int, ...] = table or (math.prod(port.shape),)
    # The code reads only this array's strides, never its values.
    tensor = np.empty(shape, np.uint8)
    return shape, layout_of(piece.of(tensor), tensor, port.hf_name)
