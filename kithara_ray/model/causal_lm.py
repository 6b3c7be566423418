"""A KerasHub causal LM built without weights, and the pure functions over its arrays.

    B  rows of the batch    T  positions    D  hidden width    V  vocabulary

`build` constructs the model: its variables have shapes and no values. `CausalLM.load` places the frozen arrays, each
process reading only what its devices own. What is computed is a function of (factors, frozen, batch).
"""

import contextlib
import importlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from keras.src.backend.common import global_state

from kithara_ray.errors import ConfigError
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model import lora, stack, weights
from kithara_ray.model.families import PRECISIONS, family_of
from kithara_ray.sharding.mesh import BATCH_AXES, factor_sharding, replicated, weight_sharding

logger = logging.getLogger(__name__)

Factors = dict[str, jax.Array]
Frozen = list[jax.Array]


@dataclass
class CausalLM:
    """A built model.

    Attributes:
        model: the `keras_hub.models.CausalLM`; its variables hold no values.
        slots: the frozen arrays in the order of `Frozen`: which ports each is made of.
        targets: the adapted layers.
        chain: the decoder blocks.
        precision: Keras dtype policy.
        mesh: the device mesh that the arrays live on.
        scan: whether equal blocks are stacked and scanned; else the blocks run one by one.
    """

    model: keras.Model
    slots: list[weights.Slot]
    targets: list[lora.Target]
    chain: stack.Chain
    precision: str
    mesh: Mesh
    scan: bool

    @property
    def factor_variables(self) -> dict[str, keras.Variable]:
        """Adapter tensor name -> variable, the order of the model's targets."""
        return {name: variable for target in self.targets for name, variable in target.variables.items()}

    @property
    def vocabulary(self) -> int:
        return self.model.backbone.vocabulary_size

    # --- the computation ---------------------------------------------------------------------------------------------

    def hidden_BTD(self, factors: Factors, frozen: Frozen, token_ids_BT, segment_ids_BT) -> jax.Array:
        """The backbone's last hidden states. `segment_ids` is 0 on padding."""
        inputs = {"token_ids": token_ids_BT, "padding_mask": segment_ids_BT}
        with self.bind(factors, frozen, unstack=not self.scan):
            if not self.scan:
                return self.model.backbone(inputs, training=False)
            value_of = self._values(factors, frozen)
            return stack.run(
                self.model.backbone,
                self.chain,
                inputs,
                values_of=lambda block: [value_of[id(variable)] for variable in block.variables],
                scanned=self._scanned(factors, frozen),
                gather=self._whole,
                place=self._rows_split,
            )

    def head_V(self, factors: Factors, frozen: Frozen, hidden) -> jax.Array:
        """Logits (..., V) of hidden states (..., D), soft-capped where the family does.

        The vocabulary is split, the rows are not: moving hidden states costs less than moving the head's weight.
        """
        hidden = self._constrain(hidden, "data")
        with self.bind(factors, frozen, unstack=False):
            logits = self.model.backbone.token_embedding(hidden, reverse=True)
        return self._constrain(logits, "data", *[None] * (logits.ndim - 2), ("fsdp", "tensor"))

    def logits_BTV(self, factors: Factors, frozen: Frozen, token_ids_BT, segment_ids_BT) -> jax.Array:
        hidden = self.hidden_BTD(factors, frozen, token_ids_BT, segment_ids_BT)
        return self.head_V(factors, frozen, hidden)

    def bind(self, factors: Factors, frozen: Frozen, unstack: bool) -> keras.StatelessScope:
        """A scope in which the model's variables have these values; without `unstack`, those outside the scan alone."""
        pairs = [
            (port.variable, value)
            for slot, array in zip(self.slots, frozen, strict=True)
            if unstack or not slot.stacked
            for port, value in slot.split(array)
        ]
        pairs += [(variable, factors[name]) for name, variable in self.factor_variables.items()]
        seeds = (variable for variable in self.model.variables if weights.is_seed(variable))
        return keras.StatelessScope(state_mapping=pairs + [(v, jnp.zeros(v.shape, v.dtype)) for v in seeds])

    def _values(self, factors: Factors, frozen: Frozen) -> dict[int, jax.Array]:
        """id(variable) -> value, of all that is not stacked."""
        values = {id(variable): factors[name] for name, variable in self.factor_variables.items()}
        plain = ((slot, array) for slot, array in zip(self.slots, frozen, strict=True) if not slot.stacked)
        return values | {id(slot.ports[0].variable): array for slot, array in plain}

    def _scanned(self, factors: Factors, frozen: Frozen) -> list[list[jax.Array]]:
        """For each place of the period, for each variable of its block, the values of all steps."""
        stacked = {id(slot.ports[0].variable): array for slot, array in zip(self.slots, frozen, strict=True)}
        name_of = {id(variable): name for name, variable in self.factor_variables.items()}
        blocks, period = self.chain.blocks, self.chain.period

        def all_steps(place: int, number: int) -> jax.Array:
            variable = blocks[place].variables[number]
            if id(variable) in stacked:
                return stacked[id(variable)]
            peers = (blocks[step * period + place].variables[number] for step in range(self.chain.steps))
            if weights.is_seed(variable):
                return jnp.zeros((self.chain.steps, *variable.shape), variable.dtype)
            # Factors are small: one gather of all steps costs less than one in each.
            return self._whole(jnp.stack([factors[name_of[id(peer)]] for peer in peers]))

        return [
            [all_steps(place, number) for number in range(len(blocks[place].variables))] for place in range(period)
        ]

    def _constrain(self, array: jax.Array, *spec) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, PartitionSpec(*spec)))

    def _whole(self, array: jax.Array) -> jax.Array:
        return self._constrain(array)

    def _rows_split(self, array: jax.Array) -> jax.Array:
        return self._constrain(array, BATCH_AXES)

    # --- the arrays --------------------------------------------------------------------------------------------------

    def load(self, base: BaseCheckpoint) -> Frozen:
        """The frozen arrays, split over the mesh; each process reads only the slices its devices own.

        Stored in the checkpoint's dtype: a float32 copy of a bfloat16 weight costs twice the memory and says nothing
        more. `bfloat16` precision alone stores bfloat16.
        """
        weights.check_complete(base, [port for slot in self.slots for port in slot.ports])
        dtype = jnp.bfloat16 if self.precision == "bfloat16" else None
        started = time.monotonic()
        frozen = []
        for slot in self.slots:
            sharding = weight_sharding(self.mesh, slot.shape, whole_dims=int(slot.stacked), prefer=slot.split_first)
            array = weights.load_sharded(base, slot, sharding, dtype)
            for port in slot.ports:
                # Keras casts a bound value to its variable's dtype; the variable follows what is stored.
                port.variable._dtype = keras.backend.standardize_dtype(array.dtype)
            frozen.append(array)
        local = sum(shard.data.nbytes for array in frozen for shard in array.addressable_shards)
        logger.info("loaded %.0f MB on this host in %.1f s", local / 1e6, time.monotonic() - started)
        return frozen

    def place_factors(self, arrays: Mapping[str, np.ndarray]) -> Factors:
        """Adapter arrays (host) as global arrays split over the mesh."""
        placed = {}
        for name, variable in self.factor_variables.items():
            array = np.asarray(arrays[name], dtype=np.float32)
            if array.shape != tuple(variable.shape):
                raise ConfigError(f"adapter tensor {name}: shape {array.shape}, the model has {tuple(variable.shape)}")
            sharding = factor_sharding(self.mesh, array.shape)
            placed[name] = jax.make_array_from_callback(array.shape, sharding, lambda index, array=array: array[index])
        return placed

    def initial_factors(self, seed: int) -> Factors:
        """PEFT's initial factors, made where they live."""
        shardings = {name: factor_sharding(self.mesh, v.shape) for name, v in self.factor_variables.items()}
        return jax.jit(lambda: lora.initial_factors(self.targets, seed), out_shardings=shardings)()


def build(
    config: Mapping,
    lora_config: LoraConfig | None,
    mesh: Mesh,
    precision: str = "mixed_bfloat16",
    scan: bool = True,
) -> CausalLM:
    """Build the model that a Hugging Face config.json describes, without weights.

    Args:
        config: the parsed config.json.
        lora_config: what to adapt; None adapts nothing.
        mesh: where its arrays will live.
        precision: "float32", "bfloat16" or "mixed_bfloat16" (activations in bfloat16).
        scan: run equal blocks as one scan. False is for decoding, and the reference in tests.

    Raises:
        UnsupportedError: the family or a field that changes the mathematics cannot be honoured.
        ConfigError: unknown precision, or a target module that matches nothing.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    family = family_of(config)
    import keras_hub

    converter = importlib.import_module(f"keras_hub.src.utils.transformers.{family.converter}")
    kwargs = converter.convert_backbone_config(dict(config))
    family.correct(config, kwargs)
    with _without_values():
        backbone = converter.backbone_cls(**kwargs, dtype=keras.DTypePolicy(precision))
        family.finish(config, backbone)
    model = getattr(keras_hub.models, family.causal_lm)(backbone=backbone, preprocessor=None)
    ports = weights.record_ports(family.converter, model, config)
    with _without_values():
        targets = lora.inject(backbone, ports, lora_config) if lora_config else []
    chain = stack.find_chain(backbone)
    return CausalLM(model, weights.slots(ports, chain if scan else None), targets, chain, precision, mesh, scan)


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
