"""A KerasHub causal LM built without weights, and the pure functions over its arrays.

    B  rows of the batch    T  positions    D  hidden width    V  vocabulary

`build` constructs the model: its variables have shapes and no values. `CausalLM.load` places the weights, each
process reading only what its devices own. What is computed is a function of (params, frozen, batch): `params` is what
is trained, the adapter's factors or all weights; `frozen` is the weights, or nothing where they are trained.
"""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from keras.src.backend.common import global_state

from kithara_ray.errors import AdapterError, ConfigError
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model import attention, embedding, lora, ports, stack, weights
from kithara_ray.model.dropout import dropping
from kithara_ray.model.families import family_of
from kithara_ray.model.options import PRECISIONS, QUANTIZATIONS, REMAT, chunk_length
from kithara_ray.model.quantized import Int8, floats
from kithara_ray.sharding.agree import check_copies
from kithara_ray.sharding.gather import Shard, local_shards
from kithara_ray.sharding.mesh import BATCH_AXES, factor_sharding, weight_sharding

logger = logging.getLogger(__name__)

Factors = dict[str, jax.Array]
Frozen = list[jax.Array | Int8]
# Factors, or, of a model whose weights are trained, its weights by the `key` of their slots.
Params = dict[str, jax.Array]


@dataclass
class CausalLM:
    """A built model.

    Attributes:
        model: the `keras_hub.models.CausalLM`; its variables hold no values.
        slots: the weights in the order of `Frozen`: which ports each is made of.
        factor_slots: the adapter's arrays, by `key` in `Factors`: which factors each is made of.
        chain: the decoder blocks.
        precision: Keras dtype policy.
        mesh: the device mesh that the arrays live on.
        scan: whether equal blocks are stacked and scanned; else the blocks run one by one.
        remat: what the blocks keep for the backward pass, one of `options.REMAT`.
        dropout: share of what the side paths are given that is dropped in training.
        trains_weights: whether the weights are what is trained; then there are no factors and nothing is frozen.
    """

    model: keras.Model
    slots: list[weights.Slot]
    factor_slots: list[lora.FactorSlot]
    chain: stack.Chain
    precision: str
    mesh: Mesh
    scan: bool
    remat: str
    dropout: float
    trains_weights: bool = False

    @property
    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Adapter tensor name -> shape."""
        return {
            name: tuple(variable.shape)
            for slot in self.factor_slots
            for name, variable in zip(slot.names, slot.variables, strict=True)
        }

    @property
    def num_parameters(self) -> int:
        """Of the model with its adapter."""
        return sum(math.prod(slot.shape) for slot in self.slots) + self._num_factors

    @property
    def num_trained(self) -> int:
        """Those of them that are trained."""
        return self.num_parameters if self.trains_weights else self._num_factors

    @property
    def _num_factors(self) -> int:
        return sum(math.prod(shape) for shape in self.adapter_shapes.values())

    @property
    def vocabulary(self) -> int:
        return self.model.backbone.vocabulary_size

    @property
    def vocabulary_axes(self) -> tuple[str, ...] | None:
        """What logits are split over in their vocabulary, if it divides."""
        ways = self.mesh.shape["fsdp"] * self.mesh.shape["tensor"]
        return ("fsdp", "tensor") if self.vocabulary % ways == 0 else None

    # --- the computation ---------------------------------------------------------------------------------------------

    def hidden_BTD(self, params: Params, frozen: Frozen, token_ids_BT, segment_ids_BT, dropout_key=None) -> jax.Array:
        """The backbone's last hidden states. Tokens see those of their own segment; `segment_ids` is 0 on padding.

        `dropout_key` drops what side paths are given, where the LoRA settings say so; None drops nothing.
        """
        positions_BT = jnp.broadcast_to(jnp.arange(token_ids_BT.shape[1]), token_ids_BT.shape)
        given = {"token_ids": token_ids_BT, "padding_mask": segment_ids_BT, "position_ids": positions_BT}
        inputs = {symbolic.name: jnp.asarray(given[symbolic.name]) for symbolic in self.model.backbone.inputs}
        with self.bind(params, frozen, unstack=not self.scan):
            if not self.scan:
                with dropping(dropout_key):
                    return self.model.backbone(inputs, training=False)
            factors, frozen = self._roles(params, frozen)
            value_of = self._values(factors, frozen)
            return stack.run(
                self.model.backbone,
                self.chain,
                inputs,
                values_of=lambda block: [value_of[id(variable)] for variable in block.variables],
                scanned=self._scanned(factors, frozen),
                gather=self._gathered(),
                place=self._rows_split,
                remat=self.remat,
                chunk=self._chunk(token_ids_BT),
                dropout_key=dropout_key,
            )

    def _chunk(self, token_ids_BT: jax.Array) -> int:
        rows, positions = token_ids_BT.shape
        ways = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        return chunk_length(-(-rows // ways), positions, self.remat)

    def head_V(self, head: Sequence[jax.Array], hidden) -> jax.Array:
        """Logits (..., V) of hidden states (..., D), soft-capped where the family does. The head has no factors.

        The vocabulary is split, if it divides, and the rows are not: moving hidden states costs less than moving the
        head's weight.

        Args:
            head: of `head_weights`.
        """
        hidden = self._constrain(hidden, "data")
        bound = zip((slot.ports[0].variable for slot in self._head_slots()), head, strict=True)
        with keras.StatelessScope(state_mapping=list(bound)):
            logits = self.model.backbone.token_embedding(hidden, reverse=True)
        return self._constrain(logits, "data", *[None] * (logits.ndim - 2), self.vocabulary_axes)

    def head_weights(self, params: Params, frozen: Frozen) -> list[jax.Array]:
        """What `head_V` computes with: the head's own weight, or the embedding that it is tied to."""
        _, frozen = self._roles(params, frozen)
        array_of = {id(slot): array for slot, array in zip(self.slots, frozen, strict=True)}
        return [array_of[id(slot)] for slot in self._head_slots()]

    def _head_slots(self) -> list[weights.Slot]:
        embedding = self.model.backbone.token_embedding
        # Of an untied head, the table that tokens are looked up in is no part.
        table = () if embedding.tie_weights else (id(embedding._embeddings),)
        read = {id(variable) for variable in embedding.variables}.difference(table)
        return [slot for slot in self.slots if id(slot.ports[0].variable) in read]

    def logits_BTV(self, params: Params, frozen: Frozen, token_ids_BT, segment_ids_BT) -> jax.Array:
        hidden = self.hidden_BTD(params, frozen, token_ids_BT, segment_ids_BT)
        return self.head_V(self.head_weights(params, frozen), hidden)

    def _roles(self, params: Params, frozen: Frozen) -> tuple[Factors, Frozen]:
        """(factors, weights in the order of the slots)."""
        return ({}, [params[slot.key] for slot in self.slots]) if self.trains_weights else (params, frozen)

    def bind(self, params: Params, frozen: Frozen, unstack: bool) -> keras.StatelessScope:
        """A scope in which the model's variables have these values; without `unstack`, those outside the scan alone."""
        factors, frozen = self._roles(params, frozen)
        pairs = [
            (port.variable, value)
            for slot, array in zip(self.slots, frozen, strict=True)
            if unstack or not slot.stacked
            for port, value in slot.split(array)
        ]
        pairs += self._each_factor(factors, unstack)
        seeds = (variable for variable in self.model.variables if ports.is_seed(variable))
        return keras.StatelessScope(state_mapping=pairs + [(v, jnp.zeros(v.shape, v.dtype)) for v in seeds])

    def _each_factor(self, factors: Factors, unstack: bool) -> Iterator[tuple[keras.Variable, jax.Array]]:
        for slot in self.factor_slots:
            if not slot.stacked:
                yield slot.variables[0], factors[slot.key]
            elif unstack:
                yield from zip(slot.variables, factors[slot.key], strict=True)

    def _values(self, factors: Factors, frozen: Frozen) -> dict[int, jax.Array]:
        """id(variable) -> value, of all that is not stacked."""
        plain = ((slot, array) for slot, array in zip(self.slots, frozen, strict=True) if not slot.stacked)
        values = {id(slot.ports[0].variable): array for slot, array in plain}
        return values | {id(variable): value for variable, value in self._each_factor(factors, unstack=False)}

    def _scanned(self, factors: Factors, frozen: Frozen) -> list[list[jax.Array]]:
        """For each place of the period, for each variable of its block, the values of all steps."""
        pairs = zip(self.slots, frozen, strict=True)
        arrays = {id(slot.ports[0].variable): array for slot, array in pairs if slot.stacked}
        # Factors are small: one gather of all steps costs less than one in each.
        arrays |= {id(s.variables[0]): self._whole(factors[s.key]) for s in self.factor_slots if s.stacked}
        peers, layouts = self.chain.peers(), self._layouts()
        single = self._values(factors, frozen)

        def all_steps(variable: keras.Variable) -> jax.Array:
            if id(variable) in arrays:
                return arrays[id(variable)]
            if ports.is_seed(variable):
                return jnp.zeros((self.chain.steps, *variable.shape), variable.dtype)
            of_all = jnp.stack([single[id(peer)] for peer in peers[id(variable)]])
            return self._constrain(of_all, None, *layouts.get(id(variable), ()))

        return [[all_steps(v) for v in block.variables] for block in self.chain.blocks[: self.chain.period]]

    def _constrain(self, array: jax.Array, *spec) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, PartitionSpec(*spec)))

    def _whole(self, array: jax.Array) -> jax.Array:
        return self._constrain(array)

    def _layouts(self) -> dict[int, tuple]:
        """id(variable) -> how one step's value of a weight is split, an entry a dim."""
        return {
            id(slot.ports[0].variable): tuple(self.weight_sharding(slot).spec)[int(slot.stacked) :]
            for slot in self.slots
        }

    def _gathered(self) -> stack.Gather:
        """A block's weight as it is computed with: whole over `fsdp`, still split over `tensor`."""
        split_of = self._layouts()

        def gather(variable: keras.Variable, value: jax.Array | Int8) -> jax.Array:
            split = split_of.get(id(variable), ())
            axes = [(axis,) if isinstance(axis, str) else axis or () for axis in split]
            gathered = ["tensor" if "tensor" in names else None for names in axes]
            if isinstance(value, Int8):
                return self._gather_of_int8(value, gathered).floats(variable.dtype)
            if not self.trains_weights:
                return self._constrain(value, *gathered)
            return self._gather_of_trained(value, gathered, split)

        return gather

    def _gather_of_int8(self, value: Int8, gathered: Sequence) -> Int8:
        """The same of bytes: they are moved, and floats are made where they have come."""
        # Scales have the dims of the values; those of size 1 cannot be split.
        sizes = value.scales.shape[: len(gathered)]
        channels = [None if size == 1 else axes for axes, size in zip(gathered, sizes, strict=True)]
        return Int8(self._constrain(value.values, *gathered), self._constrain(value.scales, *channels))

    def _gather_of_trained(self, value: jax.Array, gathered: Sequence, split: Sequence) -> jax.Array:
        """The same of a weight that is trained: its gradient is put where the weight is in every step of the scan.

        A constraint's own gradient has the constraint's layout: those of all steps together would be the whole model.
        """

        @jax.custom_vjp
        def gather(value):
            return self._constrain(value, *gathered)

        gather.defvjp(lambda value: (gather(value), None), lambda _, grad: (self._constrain(grad, *split),))
        return gather(value)

    def _rows_split(self, array: jax.Array) -> jax.Array:
        return self._constrain(array, BATCH_AXES)

    # --- the arrays --------------------------------------------------------------------------------------------------

    def abstract_frozen(self, dtype: np.dtype) -> list[jax.ShapeDtypeStruct]:
        """What `load` gives for a base of this dtype, without its bytes: for compiling ahead of time."""
        for slot in self.slots:
            self._stored_as(slot, dtype)
        return [self._abstract(slot, dtype) for slot in self.slots]

    def _abstract(self, slot: weights.Slot, dtype: np.dtype) -> jax.ShapeDtypeStruct | Int8:
        split = self.weight_sharding(slot)
        if slot.contracted is None:
            return jax.ShapeDtypeStruct(slot.shape, dtype, sharding=split)
        values = jax.ShapeDtypeStruct(slot.shape, jnp.int8, sharding=split)
        scales = jax.ShapeDtypeStruct(slot.scales_shape, jnp.float32, sharding=slot.scales_sharding(split))
        return Int8(values, scales)

    def abstract_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What is trained, without values."""
        if self.trains_weights:
            dtype = self._weight_dtype()
            return {slot.key: array for slot, array in zip(self.slots, self.abstract_frozen(dtype), strict=True)}
        return {
            slot.key: jax.ShapeDtypeStruct(slot.shape, jnp.float32, sharding=self.factor_sharding(slot))
            for slot in self.factor_slots
        }

    def _weight_dtype(self) -> np.dtype | None:
        """What weights are stored in; None is the checkpoint's dtype.

        A float32 copy of a frozen bfloat16 weight costs twice the memory and says nothing more. Of a trained one it is
        what small updates add up in.
        """
        if self.precision == "bfloat16":
            return np.dtype(jnp.bfloat16)
        return np.dtype(np.float32) if self.trains_weights else None

    def _stored_as(self, slot: weights.Slot, dtype: np.dtype) -> None:
        """Keras casts a bound value to its variable's dtype; the variable follows what is stored.

        What is stored as int8 becomes floats in the precision of the products.
        """
        if slot.contracted is not None:
            dtype = "float32" if self.precision == "float32" else "bfloat16"
        for port in slot.ports:
            port.variable._dtype = keras.backend.standardize_dtype(dtype)

    def load(self, base: BaseCheckpoint) -> Frozen:
        """The weights, split over the mesh; each process reads only the slices its devices own."""
        weights.check_complete(base, [port for slot in self.slots for port in slot.ports])
        dtype = self._weight_dtype()
        started = time.monotonic()
        frozen = []
        for slot in self.slots:
            if slot.contracted is None:
                array = weights.load_sharded(base, slot, self.weight_sharding(slot), dtype)
                self._stored_as(slot, array.dtype)
            else:
                array = weights.load_int8(base, slot, self.weight_sharding(slot))
                self._stored_as(slot, np.dtype(np.int8))
            frozen.append(array)
        local = sum(shard.data.nbytes for array in jax.tree.leaves(frozen) for shard in array.addressable_shards)
        logger.info("loaded %.0f MB on this host in %.1f s", local / 1e6, time.monotonic() - started)
        return frozen

    def as_params(self, loaded: Frozen) -> Params:
        """What `load` gave, to be trained."""
        return {slot.key: array for slot, array in zip(self.slots, loaded, strict=True)}

    def check_copies(self, params: Params, frozen: Frozen) -> int:
        """Compare the weights that stand on more than one device; see `sharding.agree`."""
        _, frozen = self._roles(params, frozen)
        named = {}
        for slot, array in zip(self.slots, frozen, strict=True):
            name = slot.ports[0].hf_name
            is_int8 = isinstance(array, Int8)
            named |= {name: array.values, f"{name} (scales)": array.scales} if is_int8 else {name: array}
        return check_copies(self.mesh, named)

    def place_factors(self, arrays: Mapping[str, np.ndarray]) -> Factors:
        """Adapter arrays (host, by tensor name) as global arrays split over the mesh.

        Raises:
            AdapterError: a tensor is missing or has another shape than the model's.
        """
        for name, shape in self.adapter_shapes.items():
            found = arrays[name].shape if name in arrays else None
            if found != shape:
                raise AdapterError(f"adapter tensor {name}: the model has shape {shape}, found {found or 'none'}")
        return self._place(lambda name: np.asarray(arrays[name], np.float32))

    def initial_factors(self, seed: int, frozen: Frozen | None = None) -> Factors:
        """PEFT's initial factors; every process draws those that its devices hold a part of.

        DoRA's magnitudes are the norms of the rows of `frozen`'s kernels, computed where these are; without `frozen`
        they are zeros, for a checkpoint to be restored over.
        """
        slot_of = {name: slot for slot in self.factor_slots for name in slot.names}
        magnitudes = [slot for slot in self.factor_slots if slot.initialiser == "norms"]
        placed = self._place(lambda name: slot_of[name].initial(name, seed))
        return placed | (self._row_norms(magnitudes, frozen) if magnitudes and frozen is not None else {})

    def _row_norms(self, magnitudes: Sequence[lora.FactorSlot], frozen: Frozen) -> Factors:
        where = {
            id(port.variable): (number, step if slot.stacked else None)
            for number, slot in enumerate(self.slots)
            for step, port in enumerate(slot.ports)
        }

        def compute(frozen):
            norms, made = {}, {}
            for slot in magnitudes:
                places = [where[id(layer._kernel)] for layer in slot.layers]
                for layer, (number, step) in zip(slot.layers, places, strict=True):
                    if number not in norms:
                        norms_O = layer._lora_map.norms_O
                        kernels = floats(frozen[number], layer._kernel.dtype)
                        norms[number] = (norms_O if step is None else jax.vmap(norms_O))(kernels)
                of_each = [norms[number] if step is None else norms[number][step] for number, step in places]
                made[slot.key] = jnp.stack(of_each) if slot.stacked else of_each[0]
            return made

        split = {slot.key: self.factor_sharding(slot) for slot in magnitudes}
        return jax.jit(compute, out_shardings=split)(frozen)

    def _place(self, tensor_of: Callable[[str], np.ndarray]) -> Factors:
        """Global arrays split over the mesh, of the adapter tensors by name."""
        placed = {}
        for slot in self.factor_slots:
            tensors = functools.cache(tensor_of)

            def part(index: tuple[slice, ...], slot=slot, tensors=tensors) -> np.ndarray:
                if not slot.stacked:
                    return tensors(slot.names[0])[index]
                return np.stack([tensors(name)[index[1:]] for name in slot.names[index[0]]])

            placed[slot.key] = jax.make_array_from_callback(slot.shape, self.factor_sharding(slot), part)
        return placed

    def weight_sharding(self, slot: weights.Slot) -> NamedSharding:
        try:
            return weight_sharding(self.mesh, slot.shape, whole_dims=int(slot.stacked), prefer=slot.split_first)
        except ConfigError as error:
            raise ConfigError(f"{slot.ports[0].hf_name}: {error}") from error

    def factor_sharding(self, slot: lora.FactorSlot) -> NamedSharding:
        return factor_sharding(self.mesh, slot.shape, whole_dims=int(slot.stacked))

    def adapter_shards(self, factors: Factors, rank: int) -> list[Shard]:
        """What this process holds of the adapter, by tensor name: stacked arrays taken apart."""
        slots = {slot.key: slot for slot in self.factor_slots}
        shards = []
        for shard in local_shards(factors, rank):
            slot = slots[shard.name]
            if slot.stacked:
                steps = zip(slot.names, shard.data, strict=True)
                shards += [Shard(name, shard.bounds[1:], data, rank) for name, data in steps]
            else:
                shards.append(shard)
        return shards


def build(
    config: Mapping,
    lora_config: LoraConfig | None,
    mesh: Mesh,
    precision: str = "mixed_bfloat16",
    scan: bool = True,
    remat: str = "block",
    stack_factors: bool = True,
    quantize: str | None = None,
    train_weights: bool = False,
) -> CausalLM:
    """Build the model that a Hugging Face config.json describes, without weights.

    Args:
        config: the parsed config.json.
        lora_config: what to adapt; None adapts nothing, and all weights are trained or none.
        mesh: where its arrays will live.
        precision: "float32", "bfloat16" or "mixed_bfloat16" (activations in bfloat16).
        scan: run equal blocks as one scan. False is for decoding, and the reference in tests.
        remat: what the scanned blocks keep for the backward pass: "block", their input alone; "dots", also
            the results of products with weights; "nested", the inputs of a few of them.
        stack_factors: train the factors, or the weights, of the scanned blocks as stacked arrays; for optimizers that
            treat every element by itself.
        train_weights: train all weights and not an adapter.
        quantize: "int8" holds the kernels of linear layers as int8, see `quantized`; embedding, head and norms stay.

    Raises:
        UnsupportedError: the family or a field that changes the mathematics cannot be honoured.
        ConfigError: unknown precision, or a target module that matches nothing.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if remat not in REMAT:
        raise ConfigError(f"remat must be one of {', '.join(REMAT)}, got {remat!r}")
    if quantize not in QUANTIZATIONS:
        raise ConfigError(f"quantize must be one of {QUANTIZATIONS}, got {quantize!r}")
    family = family_of(config)
    import keras_hub

    with _without_values():
        backbone = family.build(config, keras.DTypePolicy(precision))
    model = getattr(keras_hub.models, family.causal_lm)(backbone=backbone, preprocessor=None)
    recorded = ports.record_ports(family.converter, model, config)
    if train_weights:
        ports.check_invertible(recorded, config)
    kernels = lora.linear_modules(backbone, recorded).values() if quantize else ()
    int8_kernels = frozenset(id(layer._kernel) for layer in kernels)
    with _without_values():
        targets = lora.inject(backbone, recorded, lora_config) if lora_config else []
    chain = stack.find_chain(backbone)
    attention.install(chain.blocks, mesh)
    embedding.install(backbone.token_embedding, mesh)
    stacked = chain if scan and (stack_factors or not train_weights) else None
    slots = weights.slots(backbone, recorded, stacked, int8_kernels)
    factor_slots = lora.factor_slots(targets, chain if scan and stack_factors else None)
    dropout = lora_config.lora_dropout if lora_config else 0.0
    return CausalLM(model, slots, factor_slots, chain, precision, mesh, scan, remat, dropout, train_weights)


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Variables created here have a shape and an initialiser that is never run: no weight memory, no random numbers.

    Keras runs the initialisers of such variables when it next leaves a stateless scope, so its list of them is taken
    away. A variable that nothing binds would then silently get random values: `bind` binds every one.
    """
    before = global_state.get_global_attribute("uninitialized_variables", [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute("uninitialized_variables", list(before))
