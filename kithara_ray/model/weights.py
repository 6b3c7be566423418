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
from kithara_ray.model.stack import Chain

Transform = Callable[[np.ndarray, Sequence[int]], np.ndarray]


def _unchanged(tensor: np.ndarray, _shape: Sequence[int]) -> np.ndarray:
    return tensor


class _Uncast(np.ndarray):
    """An array that keeps its dtype: mistral's converter casts every tensor to float16, which rounds and reads it."""

    def astype(self, *args, **kwargs) -> np.ndarray:
        return self


@dataclass(frozen=True)
class Port:
    """One Keras variable and the HF tensor it is read from.

    Attributes:
        variable: the `keras.Variable`.
        hf_name: the tensor's name in the checkpoint.
        transform: HF layout to Keras layout; a transpose or a reshape, so a view of a mapped tensor stays a view.
    """

    variable: object
    hf_name: str
    transform: Transform

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape)

    def view(self, base: BaseCheckpoint) -> np.ndarray:
        """The tensor in Keras' layout, unread until it is sliced."""
        view = self.transform(base.view(self.hf_name).view(_Uncast), list(self.shape)).view(np.ndarray)
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
        # Converters may leave out the prefix (qwen3's do): transformers' causal LMs hold all but the head in `model`.
        if not hf_weight_key.startswith(("model.", "lm_head.")):
            hf_weight_key = f"model.{hf_weight_key}"
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


@dataclass(frozen=True)
class Slot:
    """One frozen array: a port, or the same variable of every step of the scan, stacked.

    Attributes:
        ports: one, or one for each step.
        stacked: whether the array's first dim counts the steps.
        split_first: the dim to split over the mesh before the largest one, if it divides; an embedding's vocabulary.
    """

    ports: tuple[Port, ...]
    stacked: bool
    split_first: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.ports), *self.ports[0].shape) if self.stacked else self.ports[0].shape

    def split(self, array: jax.Array) -> list[tuple[Port, jax.Array]]:
        """Each port with its own value."""
        if not self.stacked:
            return [(self.ports[0], array)]
        return [(port, array[step]) for step, port in enumerate(self.ports)]


def slots(ports: Sequence[Port], chain: Chain | None) -> list[Slot]:
    """The frozen arrays of a model: its ports, those of the chain's scanned blocks stacked by step."""
    by_variable = {id(port.variable): port for port in ports}
    peers = chain.peers() if chain is not None else {}
    made = []
    for port in ports:
        group = tuple(by_variable[id(variable)] for variable in peers.get(id(port.variable), ()))
        if not group:
            made.append(Slot((port,), stacked=False, split_first=_vocabulary_dim(port)))
        elif group[0] is port:
            made.append(Slot(group, stacked=True))
    return made


def _vocabulary_dim(port: Port) -> int | None:
    """An embedding table (V, D) and a head (D, V) are split over the vocabulary."""
    leaf = port.variable.path.rpartition("/")[2]
    return {"embeddings": 0, "reverse_embeddings": 1}.get(leaf)


def load_sharded(base: BaseCheckpoint, slot: Slot, sharding: NamedSharding, dtype: np.dtype | None) -> jax.Array:
    """One frozen array as a global array; this process reads only the slices its devices own.

    Args:
        dtype: what the array is stored in; None keeps the checkpoint's.
    """
    views = [port.view(base) for port in slot.ports]
    dtype = views[0].dtype if dtype is None else dtype

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not slot.stacked:
            return np.ascontiguousarray(views[0][index], dtype=dtype)
        return np.stack([np.ascontiguousarray(view[index[1:]], dtype=dtype) for view in views[index[0]]])

    return jax.make_array_from_callback(slot.shape, sharding, read)


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
