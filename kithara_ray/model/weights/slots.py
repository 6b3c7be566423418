"""The frozen arrays of a model, loaded sharded: each process reads only the slices that its devices own."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kithara_ray.errors import CheckpointError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts import stored
from kithara_ray.hf.tied_head import HEAD, is_tied
from kithara_ray.hf.tower import is_beside
from kithara_ray.hf.unused import why_unused
from kithara_ray.model import keras_compat
from kithara_ray.model.blocks.stack import Chain
from kithara_ray.model.families.ports import Port, holding
from kithara_ray.model.families.tensors import check_tensors
from kithara_ray.model.identity import IdentityMap, IdentitySet
from kithara_ray.model.weights.quantized import Int8, floats, int8_of
from kithara_ray.sharding.mesh import from_parts


@dataclass(frozen=True)
class Slot:
    """One array of weights: a port, or the same variable of every step of the scan, stacked.

    Attributes:
        ports: one port, or one for each step.
        stacked: True if the array's first dim counts the steps.
        split_first: dims that the mesh splits before the largest one; the first that divides is split. They are an
            embedding's vocabulary, the experts, or a kernel's dims that are the file's rows, so that a host reads
            contiguous stretches of the file.
        contracted: the dims that a linear layer contracts, if its kernel is held as int8; None holds floats.
    """

    ports: tuple[Port, ...]
    stacked: bool
    split_first: tuple[int, ...] = ()
    contracted: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """The array's name in a state: the name of its first tensor."""
        return self.ports[0].hf_name

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.ports), *self.ports[0].shape) if self.stacked else self.ports[0].shape

    def dtype_of(self, dtypes: Mapping[str, np.dtype]) -> np.dtype:
        """The array's dtype where `load_sharded` reads tensors of these dtypes; MXFP4 is read as bfloat16."""
        names = [piece.hf_name for port in self.ports for piece in port.pieces]
        return holding([dtypes.get(name, np.dtype(jnp.bfloat16)) for name in names])

    def split(self, array: jax.Array | Int8) -> list[tuple[Port, jax.Array]]:
        """Pair each port with its own value, in floats."""
        steps = [array[step] for step in range(len(self.ports))] if self.stacked else [array]
        return [(port, floats(step, port.variable.dtype)) for port, step in zip(self.ports, steps, strict=True)]

    @property
    def int8_dims(self) -> tuple[int, ...]:
        """`contracted` of a kernel that is held as int8."""
        assert self.contracted is not None
        return self.contracted

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Shape of an int8 array's scales: one scale for each output channel."""
        return tuple(1 if dim in self.int8_dims else size for dim, size in enumerate(self.shape))

    def scales_sharding(self, sharding: NamedSharding) -> NamedSharding:
        """Split the scales as their channels are split."""
        spec = [*sharding.spec, *[None] * (len(self.shape) - len(sharding.spec))]
        split = [None if dim in self.int8_dims else axes for dim, axes in enumerate(spec)]
        return NamedSharding(sharding.mesh, PartitionSpec(*split))


def slots(
    backbone: keras.Model, ports: Sequence[Port], chain: Chain | None, int8_kernels: Collection[keras.Variable] = ()
) -> list[Slot]:
    """List the arrays of a model's weights: its ports, with those of the chain's scanned blocks stacked by step.

    Args:
        int8_kernels: the kernels to hold as int8.
    """
    port_of = IdentityMap((port.variable, port) for port in ports)
    linear = [layer for layer in keras_compat.all_layers(backbone) if _is_linear(layer)]
    rows = IdentityMap((layer.kernel, _produced_dims(layer)) for layer in linear)
    peers = chain.peers() if chain is not None else IdentityMap()
    as_int8 = IdentitySet(int8_kernels)

    def split_first(port: Port) -> tuple[int, ...]:
        return _vocabulary_dim(port) or port.tiled_dims or rows.get(port.variable, ())

    def contracted(port: Port, before: int) -> tuple[int, ...] | None:
        if port.variable not in as_int8:
            return None
        return tuple(dim + before for dim in range(len(port.shape)) if dim not in rows[port.variable])

    made = []
    for port in ports:
        group = tuple(port_of[peer] for peer in peers.get(port.variable, ()))
        if not group:
            made.append(Slot((port,), False, split_first(port), contracted(port, 0)))
        elif group[0] is port:
            made.append(Slot(group, True, tuple(dim + 1 for dim in split_first(port)), contracted(port, 1)))
    return made


def _vocabulary_dim(port: Port) -> tuple[int, ...]:
    """The vocabulary dim of an embedding table (V, D) or a head (D, V), which is split over it."""
    leaf = port.variable.path.rpartition("/")[2]
    return {"embeddings": (0,), "reverse_embeddings": (1,)}.get(leaf, ())


def _is_linear(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))


def _produced_dims(layer: keras.layers.Layer) -> tuple[int, ...]:
    """The dims of a kernel that appear in its layer's output; Hugging Face stores them as rows."""
    if isinstance(layer, keras.layers.Dense):
        return (1,)
    kernel, output = layer.equation.split(",")[1].split("->")
    return tuple(dim for dim, label in enumerate(kernel) if label in output)


def load_sharded(base: BaseCheckpoint, slot: Slot, sharding: NamedSharding, dtype: np.dtype | None) -> jax.Array:
    """Load one frozen array as a global array; this process reads only the slices its devices own.

    Args:
        dtype: the array's dtype; None keeps the checkpoint's. For a stack of tensors with several dtypes, None gives
            one that holds all their values exactly.
    """
    views = [port.view(base) for port in slot.ports]
    dtype = holding([view.dtype for view in views]) if dtype is None else dtype

    def read(index: tuple[slice, ...]) -> np.ndarray:
        parts = [view[index[1:]] for view in views[index[0]]] if slot.stacked else [views[0][index]]
        own = _aligned(((len(parts),) if slot.stacked else ()) + parts[0].shape, dtype)
        for place, part in enumerate(parts):
            own[place if slot.stacked else ...] = part
        return own

    array = from_parts(slot.shape, sharding, read)
    base.forget_pages()
    return array


def load_int8(base: BaseCheckpoint, slot: Slot, sharding: NamedSharding) -> Int8:
    """Load one kernel, or the same kernel of every step, as int8.

    This process reads the channels that its devices own a part of. It quantises one matrix at a time, so no float32
    copy exceeds one matrix's part.
    """
    views: list[Any] = [port.view(base) for port in slot.ports]
    before = int(slot.stacked)
    dims = tuple(dim - before for dim in slot.int8_dims)
    scales_of: dict[tuple, np.ndarray] = {}

    def quantised(index: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Quantise some channels, whole in the contracted dims."""
        whole = tuple(slice(None) if dim in dims else part for dim, part in enumerate(index[before:]))
        made = [int8_of(view[whole], dims) for view in (views[index[0]] if slot.stacked else views)]
        values, scales = (np.stack(arrays) if slot.stacked else arrays[0] for arrays in zip(*made, strict=True))
        return values, scales

    def read_values(index: tuple[slice, ...]) -> np.ndarray:
        values, scales_of[_channels(index)] = quantised(index)
        return values[tuple(part if dim in slot.int8_dims else slice(None) for dim, part in enumerate(index))]

    def read_scales(index: tuple[slice, ...]) -> np.ndarray:
        return scales_of[_channels(index)] if _channels(index) in scales_of else quantised(index)[1]

    def _channels(index: tuple[slice, ...]) -> tuple:
        sizes = enumerate(zip(index, slot.shape, strict=True))
        return tuple(part.indices(size)[:2] for dim, (part, size) in sizes if dim not in slot.int8_dims)

    values = from_parts(slot.shape, sharding, read_values)
    scales = from_parts(slot.scales_shape, slot.scales_sharding(sharding), read_scales)
    base.forget_pages()
    return Int8(values, scales)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array aligned to 64 bytes, which JAX on CPU uses in place; JAX would copy an unaligned one."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def check_complete(base: BaseCheckpoint, ports: Sequence[Port]) -> None:
    """Check that the checkpoint holds every tensor that the model needs, and no other tensor.

    `check_tensors` checks the headers, as it does before a run; the converters' own map has the last word. A head that
    is tied to the embedding may be present with the same values. See also `hf.unused`.

    Raises:
        CheckpointError: names the tensors.
    """
    check_tensors(base)
    needed = {name for port in ports for piece in port.pieces for name in stored.names_of(base, piece.hf_name)}
    missing = sorted(needed - set(base.names))
    if missing:
        raise CheckpointError(f"{base.directory}: {len(missing)} tensors are missing, the first is {missing[0]}")
    tied = {HEAD} if is_tied(base.config) else set()
    others = set(base.names) - needed - tied
    known = (name for name in others if why_unused(base.config, name) is not None or is_beside(base.config, name))
    extra = sorted(others - set(known))
    if extra:
        raise CheckpointError(
            f"{base.directory}: {len(extra)} tensors belong to nothing in the model, the first is {extra[0]}; "
            "config.json and weights do not belong together"
        )
