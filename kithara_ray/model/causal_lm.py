"""A KerasHub causal LM built without weights, and the pure functions over its arrays.

    B  rows of the batch    T  positions    D  hidden width    V  vocabulary

`build` constructs the model abstractly: its variables have shapes and no values. `CausalLM.load` places the frozen
arrays, each process reading only what its devices own. What is computed is a function of (factors, frozen, batch).
"""

import contextlib
import importlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh
from keras.src.backend.common import global_state

from kithara_ray.errors import ConfigError
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model import lora, weights
from kithara_ray.model.families import PRECISIONS, family_of
from kithara_ray.sharding.mesh import replicated, weight_sharding

logger = logging.getLogger(__name__)

Factors = dict[str, jax.Array]
Frozen = list[jax.Array]


@dataclass
class CausalLM:
    """A built model.

    Attributes:
        model: the `keras_hub.models.CausalLM`; its variables hold no values.
        ports: the recorded map, a Port for each frozen variable; the order of `Frozen`.
        targets: the adapted layers.
        precision: Keras dtype policy.
    """

    model: keras.Model
    ports: list[weights.Port]
    targets: list[lora.Target]
    precision: str
    _seeds: list[keras.Variable] = field(default_factory=list)

    @property
    def factor_variables(self) -> dict[str, keras.Variable]:
        """Adapter tensor name -> variable, the order of the model's targets."""
        return {name: variable for target in self.targets for name, variable in target.variables.items()}

    def bind(self, factors: Mapping[str, jax.Array], frozen: Frozen) -> keras.StatelessScope:
        """A scope in which the model's variables have these values."""
        pairs = [(port.variable, array) for port, array in zip(self.ports, frozen, strict=True)]
        pairs += [(variable, factors[name]) for name, variable in self.factor_variables.items()]
        pairs += [(seed, jnp.zeros(seed.shape, seed.dtype)) for seed in self._seeds]
        return keras.StatelessScope(state_mapping=pairs)

    def hidden_BTD(self, factors, frozen, token_ids_BT, segment_ids_BT) -> jax.Array:
        """The backbone's last hidden states. `segment_ids` is 0 on padding."""
        with self.bind(factors, frozen):
            return self.model.backbone({"token_ids": token_ids_BT, "padding_mask": segment_ids_BT}, training=False)

    def head_V(self, factors, frozen, hidden) -> jax.Array:
        """Logits (..., V) of hidden states (..., D), soft-capped where the family does."""
        with self.bind(factors, frozen):
            return self.model.backbone.token_embedding(hidden, reverse=True)

    def logits_BTV(self, factors, frozen, token_ids_BT, segment_ids_BT) -> jax.Array:
        hidden = self.hidden_BTD(factors, frozen, token_ids_BT, segment_ids_BT)
        return self.head_V(factors, frozen, hidden)

    def load(self, base: BaseCheckpoint, mesh: Mesh) -> Frozen:
        """The frozen arrays, in the order of `ports`, split over `mesh`.

        Each process reads only the slices its devices own. Stored in the checkpoint's dtype: a float32 copy of a
        bfloat16 weight costs twice the memory and says nothing more. `bfloat16` precision alone stores bfloat16.
        """
        weights.check_complete(base, self.ports)
        dtype = jnp.bfloat16 if self.precision == "bfloat16" else None
        started = time.monotonic()
        frozen = []
        for port in self.ports:
            array = weights.load_sharded(base, port, weight_sharding(mesh, port.shape), dtype)
            # Keras casts a bound value to its variable's dtype; the variable follows what is stored.
            port.variable._dtype = keras.backend.standardize_dtype(array.dtype)
            frozen.append(array)
        local = sum(shard.data.nbytes for array in frozen for shard in array.addressable_shards)
        logger.info("loaded %.0f MB on this host in %.1f s", local / 1e6, time.monotonic() - started)
        return frozen

    def place_factors(self, arrays: Mapping[str, np.ndarray], mesh: Mesh) -> Factors:
        """Adapter arrays (host) as global arrays split over `mesh`."""
        placed = {}
        for name, variable in self.factor_variables.items():
            array = np.asarray(arrays[name], dtype=np.float32)
            if array.shape != tuple(variable.shape):
                raise ConfigError(f"adapter tensor {name}: shape {array.shape}, the model has {tuple(variable.shape)}")
            sharding = factor_sharding(mesh, array.shape)
            placed[name] = jax.make_array_from_callback(array.shape, sharding, lambda index, array=array: array[index])
        return placed

    def initial_factors(self, seed: int, mesh: Mesh) -> Factors:
        """PEFT's initial factors, made where they live."""
        shardings = {name: factor_sharding(mesh, v.shape) for name, v in self.factor_variables.items()}
        return jax.jit(lambda: lora.initial_factors(self.targets, seed), out_shardings=shardings)()


def factor_sharding(mesh: Mesh, shape):
    """A factor is split like a weight where its long dim divides evenly, and replicated where not."""
    try:
        return weight_sharding(mesh, shape)
    except ConfigError:
        return replicated(mesh)


def build(config: Mapping, lora_config: LoraConfig | None, precision: str = "mixed_bfloat16") -> CausalLM:
    """Build the model that a Hugging Face config.json describes, without weights.

    Args:
        config: the parsed config.json.
        lora_config: what to adapt; None adapts nothing.
        precision: "float32", "bfloat16" or "mixed_bfloat16" (activations in bfloat16).

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
    return CausalLM(model, ports, targets, precision, [v for v in model.variables if weights.is_seed(v)])


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
