"""The arrays of a model: their names, their split over the mesh, and the source of their values.

There are two kinds. The weights, one per `slots.Slot`, come in the order of `Frozen`. The adapter's factors come one
per `layers.FactorSlot`. Each process reads only the weight slices that its devices own from the base checkpoint.
Factors are drawn as PEFT draws them, or placed from an adapter. Equal arrays of the scanned blocks form one stacked
array: (steps, ...).
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kithara_ray.errors import AdapterError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model import keras_compat
from kithara_ray.model.identity import IdentityMap, IdentitySet
from kithara_ray.model.lora import base_weights, layers
from kithara_ray.model.options import ModelOptions
from kithara_ray.model.weights import slots
from kithara_ray.model.weights.quantized import Quantized, floats, in_floats
from kithara_ray.model.weights.slots import Slot
from kithara_ray.sharding.agree import check_copies
from kithara_ray.sharding.gather import Shard, local_shards
from kithara_ray.sharding.mesh import factor_sharding, from_parts, replicated, weight_sharding

logger = logging.getLogger(__name__)

AdapterSlot = layers.FactorSlot | base_weights.BaseSlot
Factors = dict[str, jax.Array]
Frozen = list[jax.Array | Quantized]
Abstract = jax.ShapeDtypeStruct | Quantized  # an array without values
# The factors; for a model that trains its weights, the weights by their slots' `key`.
Params = dict[str, jax.Array]


@dataclass(kw_only=True)
class ModelArrays:
    """The arrays of a built model, whose variables hold no values.

    Attributes:
        slots: the weights in the order of `Frozen`, each with its ports.
        factor_slots: the adapter's arrays, by `key` in `Factors`, each with its factors.
        base_slots: the other arrays that an adapter trains: weights of the base.
        experts: the experts' kernels that the mesh's axis `expert` splits, and that stay where they are.
        mesh: the device mesh that holds the arrays.
        options: the options that the model was built with.
    """

    slots: list[slots.Slot]
    factor_slots: list[layers.FactorSlot]
    mesh: Mesh
    options: ModelOptions
    base_slots: Sequence[base_weights.BaseSlot] = ()
    experts: IdentitySet[keras.Variable] = field(default_factory=lambda: IdentitySet[keras.Variable]())

    @property
    def precision(self) -> str:
        """Keras dtype policy."""
        return self.options.precision

    @property
    def trains_weights(self) -> bool:
        """True if the weights are trained; then there are no factors and nothing is frozen."""
        return self.options.train_weights

    @property
    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Adapter tensor name -> shape."""
        return {
            name: tuple(variable.shape)
            for slot in self.factor_slots
            for name, variable in zip(slot.names, slot.variables, strict=True)
        } | {name: slot.one for slot in self.base_slots for name in slot.names}

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model with its adapter."""
        return sum(math.prod(slot.shape) for slot in self.slots) + self._num_factors

    @property
    def num_trained(self) -> int:
        """Number of trained parameters."""
        if self.trains_weights:
            return self.num_parameters
        return self._num_factors + sum(math.prod(slot.shape) for slot in self.base_slots)

    @property
    def _num_factors(self) -> int:
        return sum(math.prod(slot.shape) for slot in self.factor_slots)

    def roles(self, params: Params, frozen: Frozen) -> tuple[Factors, Frozen]:
        """Split the arrays into (factors, weights in the order of the slots)."""
        return ({}, [params[slot.key] for slot in self.slots]) if self.trains_weights else (params, frozen)

    def weights_of(self, params: Params, frozen: Frozen) -> Frozen:
        """The weights that the model computes with, in slot order; trained values replace those of the base."""
        _, frozen = self.roles(params, frozen)
        made = list(frozen)
        for slot in self.base_slots:
            weights = slot.put(in_floats(made[slot.number]), params[slot.key])
            split = self.weight_sharding(self.slots[slot.number])
            made[slot.number] = jax.lax.with_sharding_constraint(weights, split)
        return made

    def weight_sharding(self, slot: Slot) -> NamedSharding:
        whole, is_of_experts = int(slot.stacked), slot.ports[0].variable in self.experts
        experts = whole if is_of_experts else None
        return weight_sharding(self.mesh, slot.shape, whole, slot.split_first, slot.parts, experts)

    def factor_sharding(self, slot: layers.FactorSlot) -> NamedSharding:
        return factor_sharding(self.mesh, slot.shape, whole_dims=int(slot.stacked))

    def base_sharding(self, slot: base_weights.BaseSlot) -> NamedSharding:
        """Split a table as the model splits it for its computation, rows as factors are; replicate biases."""
        of_weight = self.weight_sharding(self.slots[slot.number])
        spec = slot.spec(tuple(of_weight.spec))
        if spec is not None:
            return NamedSharding(of_weight.mesh, PartitionSpec(*spec))
        return replicated(self.mesh) if slot.rows is None else factor_sharding(self.mesh, slot.shape)

    @property
    def adapter_slots(self) -> list[AdapterSlot]:
        """The arrays that an adapter trains."""
        return [*self.factor_slots, *self.base_slots]

    def _sharding_of(self, slot: AdapterSlot) -> NamedSharding:
        return self.factor_sharding(slot) if isinstance(slot, layers.FactorSlot) else self.base_sharding(slot)

    # --- without values ----------------------------------------------------------------------------------------------

    def abstract_frozen(self, dtype: np.dtype | Mapping[str, np.dtype]) -> list[Abstract]:
        """Shapes, dtypes and shardings that `load` gives, to compile ahead of time.

        dtype: the dtype of the base's tensors, or of each by its name.
        """
        dtypes = [slot.dtype_of(dtype) if isinstance(dtype, Mapping) else dtype for slot in self.slots]
        for slot, stored in zip(self.slots, dtypes, strict=True):
            self._stored_as(slot, stored)
        self._store_trained()
        return [self._abstract(slot, stored) for slot, stored in zip(self.slots, dtypes, strict=True)]

    def _abstract(self, slot: Slot, dtype: np.dtype) -> Abstract:
        split = self.weight_sharding(slot)
        if slot.storage is None:
            return jax.ShapeDtypeStruct(slot.shape, dtype, sharding=split)
        parts = zip(
            (slot.storage.values(slot.shape), slot.storage.scales(slot.shape)),
            (split, slot.scales_sharding(split)),
            strict=True,
        )
        values, scales = (jax.ShapeDtypeStruct(*part, sharding=sharding) for part, sharding in parts)
        return slot.quantized(values, scales)

    def abstract_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The trained arrays without values."""
        if self.trains_weights:
            dtype = self._weight_dtype()
            assert dtype is not None  # trained weights have a dtype of their own
            params = {}
            for slot, array in zip(self.slots, self.abstract_frozen(dtype), strict=True):
                assert isinstance(array, jax.ShapeDtypeStruct)  # trained weights are never quantised
                params[slot.key] = array
            return params
        return {
            slot.key: jax.ShapeDtypeStruct(slot.shape, jnp.float32, sharding=self._sharding_of(slot))
            for slot in self.adapter_slots
        }

    def _weight_dtype(self) -> np.dtype | None:
        """The dtype that weights are stored in; None means the checkpoint's dtype.

        A float32 copy of a frozen bfloat16 weight takes twice the memory and carries no more information. A trained
        weight needs float32, because small updates add up in it.
        """
        if self.precision == "bfloat16":
            return np.dtype(jnp.bfloat16)
        return np.dtype(np.float32) if self.trains_weights else None

    def _stored_as(self, slot: Slot, dtype: np.dtype) -> None:
        """Set the variables of a slot to the dtype of its array, because Keras casts a bound value to that dtype.

        Arrays stored as integers become floats in the precision of the products.
        """
        floats = "float32" if self.precision == "float32" else "bfloat16"
        stored = keras.backend.standardize_dtype(dtype if slot.storage is None else floats)
        for port in slot.ports:
            keras_compat.set_dtype(port.variable, stored)

    def _store_trained(self) -> None:
        """Make base weights that are trained as a whole float32 where the model computes with them."""
        for slot in self.base_slots:
            if slot.rows is None:
                self._stored_as(self.slots[slot.number], np.dtype(np.float32))

    # --- weights -----------------------------------------------------------------------------------------------------

    def load(self, base: BaseCheckpoint) -> Frozen:
        """Read the weights, split over the mesh; each process reads only the slices its devices own."""
        slots.check_complete(base, [port for slot in self.slots for port in slot.ports])
        dtype = self._weight_dtype()
        started = time.monotonic()
        frozen = []
        for slot in self.slots:
            if slot.storage is None:
                array = slots.load_sharded(base, slot, self.weight_sharding(slot), dtype)
                self._stored_as(slot, array.dtype)
            else:
                array = slots.load_quantized(base, slot, self.weight_sharding(slot))
                self._stored_as(slot, np.dtype(np.int8))
            frozen.append(array)
        self._store_trained()
        local = sum(shard.data.nbytes for array in jax.tree.leaves(frozen) for shard in array.addressable_shards)
        logger.info("loaded %.0f MB on this host in %.1f s", local / 1e6, time.monotonic() - started)
        return frozen

    def as_params(self, loaded: Frozen) -> Params:
        """Name the arrays from `load` by their slots, as trained parameters."""
        return {slot.key: in_floats(array) for slot, array in zip(self.slots, loaded, strict=True)}

    def check_copies(self, params: Params, frozen: Frozen) -> int:
        """Compare the weights that several devices hold copies of; see `sharding.agree`."""
        _, frozen = self.roles(params, frozen)
        named = {}
        for slot, array in zip(self.slots, frozen, strict=True):
            name = slot.ports[0].hf_name
            if isinstance(array, Quantized):
                named |= {name: array.values, f"{name} (scales)": array.scales}
            else:
                named[name] = array
        return check_copies(self.mesh, named)

    # --- the adapter -------------------------------------------------------------------------------------------------

    def place_factors(self, arrays: Mapping[str, np.ndarray]) -> Factors:
        """Place adapter arrays (host, by tensor name) as global arrays split over the mesh.

        Raises:
            AdapterError: a tensor is missing or has another shape than the model's.
        """
        for name, shape in self.adapter_shapes.items():
            found = arrays[name].shape if name in arrays else None
            if found != shape:
                raise AdapterError(f"adapter tensor {name}: the model has shape {shape}, found {found or 'none'}")
        return self._place(lambda name: np.asarray(arrays[name], np.float32), self.adapter_slots)

    def initial_factors(self, seed: int, frozen: Frozen | None = None) -> Factors:
        """Make PEFT's initial factors; every process draws those that its devices hold a part of.

        Trained weights of the base start at the base's values. DoRA's magnitudes start at the row norms of `frozen`'s
        kernels, computed on the devices that hold these. Without `frozen` both are zeros, as placeholders for a
        checkpoint to be restored.
        """
        slot_of = {name: slot for slot in self.factor_slots for name in slot.names}
        shapes = {name: slot.one for slot in self.base_slots for name in slot.names}
        magnitudes = [slot for slot in self.factor_slots if slot.initialiser == "norms"]
        placed = self._place(lambda name: slot_of[name].initial(name, seed), self.factor_slots)
        if frozen is None:
            return placed | self._place(lambda name: np.zeros(shapes[name], np.float32), self.base_slots)
        placed |= self._base_values(frozen)
        return placed | (self._row_norms(magnitudes, frozen) if magnitudes else {})

    def _base_values(self, frozen: Frozen) -> Factors:
        """The base's own values of the base weights that are trained."""
        if not self.base_slots:
            return {}
        split = {slot.key: self.base_sharding(slot) for slot in self.base_slots}
        weights = {slot.number: frozen[slot.number] for slot in self.base_slots}
        take = lambda weights: {slot.key: slot.take(weights[slot.number]) for slot in self.base_slots}  # noqa: E731
        return jax.jit(take, out_shardings=split)(weights)

    def _row_norms(self, magnitudes: Sequence[layers.FactorSlot], frozen: Frozen) -> Factors:
        where = IdentityMap(
            (port.variable, (number, step if slot.stacked else None))
            for number, slot in enumerate(self.slots)
            for step, port in enumerate(slot.ports)
        )

        def compute(frozen):
            norms, made = {}, {}
            for slot in magnitudes:
                places = [where[layer.kernel] for layer in slot.layers]
                for layer, (number, step) in zip(slot.layers, places, strict=True):
                    if number not in norms:
                        norms_O = layer.lora_map.norms_O
                        kernels = floats(frozen[number], layer.kernel.dtype)
                        norms[number] = (norms_O if step is None else jax.vmap(norms_O))(kernels)
                of_each = [norms[number] if step is None else norms[number][step] for number, step in places]
                made[slot.key] = jnp.stack(of_each) if slot.stacked else of_each[0]
            return made

        split = {slot.key: self.factor_sharding(slot) for slot in magnitudes}
        return jax.jit(compute, out_shardings=split)(frozen)

    def _place(self, tensor_of: Callable[[str], np.ndarray], slots: Sequence[AdapterSlot]) -> Factors:
        """Make global arrays split over the mesh from the adapter tensors by name."""
        placed = {}
        for slot in slots:
            tensors = functools.cache(tensor_of)

            def part(index: tuple[slice, ...], slot=slot, tensors=tensors) -> np.ndarray:
                if not slot.stacked:
                    return tensors(slot.names[0])[index]
                return np.stack([tensors(name)[index[1:]] for name in slot.names[index[0]]])

            placed[slot.key] = from_parts(slot.shape, self._sharding_of(slot), part)
        return placed

    def adapter_shards(self, factors: Factors, rank: int) -> list[Shard]:
        """This process's shards of the adapter, by tensor name: stacked arrays are taken apart."""
        slots = {slot.key: slot for slot in self.adapter_slots}
        shards = []
        for shard in local_shards(factors, rank):
            slot = slots[shard.name]
            if slot.stacked:
                steps = zip(slot.names, shard.data, strict=True)
                shards += [Shard(name, shard.bounds[1:], data, rank) for name, data in steps]
            else:
                shards.append(shard)
        return shards
