"""Which Hugging Face tensor feeds which Keras variable, and loading it sharded.

There are no mapping tables here. KerasHub's own converter is run once with a loader that records instead of reading:
every call `port_weight(keras_variable, hf_weight_key, hook_fn)` is one line of the map.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding

from kithara_ray.errors import CheckpointError, UnsupportedError
from kithara_ray.hf.checkpoint import BaseCheckpoint

Transform = Callable[[np.ndarray, Sequence[int]], np.ndarray]


def _unchanged(tensor: np.ndarray, _shape: Sequence[int]) -> np.ndarray:
    return tensor


@dataclass(frozen=True)
class Port:
    """One Keras variable and the HF tensor it is read from.

    Attributes:
        variable: the `keras.Variable`.
        hf_name: the tensor's name in the checkpoint.
        transform: HF layout to Keras layout; a transpose or a reshape, so a view of a memory-mapped tensor stays a view.
    """

    variable: object
    hf_name: str
    transform: Transform

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape)

    def view(self, base: BaseCheckpoint) -> np.ndarray:
        """The tensor in Keras' layout, unread until it is sliced."""
        view = self.transform(base.view(self.hf_name), list(self.shape))
        if tuple(view.shape) != self.shape:
            raise CheckpointError(
                f"{base.directory}: {self.hf_name} has shape {tuple(base.tensors[self.hf_name].shape)}, "
                f"which does not give the model's {self.shape}; config.json and weights do not belong together"
            )
        return view


class _Recorder:
    """Stands where KerasHub's `SafetensorLoader` stands, and writes down what it is asked for."""

    def __init__(self):
        self.ports: list[Port] = []

    def port_weight(self, keras_variable, hf_weight_key: str, hook_fn: Transform | None = None) -> None:
        self.ports.append(Port(keras_variable, hf_weight_key, hook_fn or _unchanged))

    def get_tensor(self, hf_weight_key: str):
        raise UnsupportedError(f"KerasHub's converter reads {hf_weight_key} by itself; its weights cannot be recorded")


def record_ports(converter: str, model, config: Mapping) -> list[Port]:
    """The map of one built causal LM, a Port for each of its variables that hold weights.

    Raises:
        UnsupportedError: a variable is not fed by the converter, or twice.
    """
    module = importlib.import_module(f"keras_hub.src.utils.transformers.{converter}")
    recorder = _Recorder()
    module.convert_weights(model.backbone, recorder, dict(config))
    fed = [id(port.variable) for port in recorder.ports]
    unfed = [v.path for v in model.variables if id(v) not in fed and not is_seed(v)]
    if unfed or len(set(fed)) != len(fed):
        raise UnsupportedError(f"KerasHub's {converter} leaves {unfed[:3]} unloaded or loads a variable twice")
    return recorder.ports


def is_seed(variable) -> bool:
    """Dropout layers own a seed state; it holds no weight and the rate is 0."""
    return "seed_generator" in variable.path


def load_sharded(base: BaseCheckpoint, port: Port, sharding: NamedSharding, dtype: np.dtype | None) -> jax.Array:
    """One frozen weight as a global array; this process reads only the slices its devices own.

    Args:
        dtype: what the array is stored in; None keeps the checkpoint's.
    """
    view = port.view(base)
    dtype = view.dtype if dtype is None else dtype

    def read(index: tuple[slice, ...]) -> np.ndarray:
        return np.ascontiguousarray(view[index], dtype=dtype)

    return jax.make_array_from_callback(port.shape, sharding, read)


def check_complete(base: BaseCheckpoint, ports: Sequence[Port]) -> None:
    """Every tensor that the model needs is in the checkpoint and, tied heads aside, the other way round.

    Raises:
        CheckpointError: names the tensors.
    """
    needed = {port.hf_name for port in ports}
    missing = sorted(needed - set(base.names))
    if missing:
        raise CheckpointError(f"{base.directory}: {len(missing)} tensors are missing, the first is {missing[0]}")
    ignorable = ("rotary_emb.inv_freq", "lm_head.weight")
    extra = sorted(name for name in set(base.names) - needed if not name.endswith(ignorable))
    if extra:
        raise CheckpointError(
            f"{base.directory}: {len(extra)} tensors belong to nothing in the model, the first is {extra[0]}; "
            "config.json and weights do not belong together"
        )
