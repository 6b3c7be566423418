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
from kithara_ray.model.weights.quantized import Quantized, Storage, floats
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
        storage: how a linear layer's kernel is held as integers; None holds floats.
    """

    ports: tuple[Port, ...]
    stacked: bool
    split_first: tuple[int, ...] = ()
    storage: Storage | None = None

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

    def split(self, array: jax.Array | Quantized) -> list[tuple[Port, jax.Array]]:
        """Pair each port with its own value, in floats."""
        steps = [array[step] for step in range(len(self.ports))] if self.stacked else [array]
        return [(port, floats(step, port.variable.dtype)) for port, step in zip(self.ports, steps, strict=True)]

    def quantized(self, values: Any, scales: Any) -> Quantized:
        """The array made of these values and scales, which may be abstract."""
        assert self.storage is not None
        grouped = self.storage.grouped
        dim = None if grouped is None else grouped - len(self.shape)
        return Quantized(values, scales, self.storage.kind, dim)

    @property
    def parts(self) -> tuple[int, ...]:
        """For each dim, the number of parts that it may be cut into: four-bit weights of a group stay on one device."""
        if self.storage is None or self.storage.grouped is None:
            return self.shape
        return self.storage.scales(self.shape)[0]

    def scales_sharding(self, sharding: NamedSharding) -> NamedSharding:
        """Split the scales as their channels or groups are split."""
        assert self.storage is not None
        shape = self.storage.scales(self.shape)[0]
        spec = [*sharding.spec, *[None] * (len(self.shape) - len(sharding.spec))]
        split = [None if size == 1 else axes for size, axes in zip(shape, spec, strict=True)]
        return NamedSharding(sharding.mesh, PartitionSpec(*split))


def slots(
    backbone: keras.Model,
    ports: Sequence[Port],
    chain: Chain | None,
    quantize: str | None = None,
    kernels: Collection[keras.Variable] = (),
) -> list[Slot]:
    """List the arrays of a model's weights: its ports, with those of the chain's scanned blocks stacked by step.

    Args:
        quantize: "int8", "int4" or "nf4" holds the `kernels` so.
        kernels: kernels of linear layers.
    """
    port_of = IdentityMap((port.variable, port) for port in ports)
    linear = [layer for layer in keras_compat.all_layers(backbone) if _is_linear(layer)]
    rows = IdentityMap((layer.kernel, _produced_dims(layer)) for layer in linear)
    peers = chain.peers() if chain is not None else IdentityMap()
    as_integers = IdentitySet(kernels if quantize else ())

    def split_first(port: Port) -> tuple[int, ...]:
        return _vocabulary_dim(port) or port.tiled_dims or rows.get(port.variable, ())

    def storage(port: Port, before: int) -> Storage | None:
        if quantize is None or port.variable not in as_integers:
            return None
        dims = tuple(dim + before for dim in range(len(port.shape)) if dim not in rows[port.variable])
        return Storage(quantize, dims)

    made = []
    for port in ports:
        group = tuple(port_of[peer] for peer in peers.get(port.variable, ()))
        if not group:
            made.append(Slot((port,), False, split_first(port), storage(port, 0)))
        elif group[0] is port:
            made.append(Slot(group, True, tuple(dim + 1 for dim in split_first(port)), storage(port, 1)))
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


def load_quantized(base: BaseCheckpoint, slot: Slot, sharding: NamedSharding) -> Quantized:
    """Load one kernel, or the same kernel of every step, as integers.

    This process reads the channels or the groups that its devices own a part of. It quantises one matrix at a time, so
    no float32 copy exceeds one matrix's part.
    """
    storage = slot.storage
    assert storage is not None
    views: list[Any] = [port.view(base) for port in slot.ports]
    before = int(slot.stacked)
    group = None if storage.grouped is None else storage.group_in(slot.shape)
    of_one = storage.after(-before)
    scales_of: dict[tuple, np.ndarray] = {}

    def read_from(index: tuple[slice, ...], of_index: int) -> tuple[tuple[int, int], ...]:
        """The elements of the kernel that a part of the values or scales needs, as bounds.

        Args:
            of_index: number of the kernel's elements for one of the index, along the grouped dim.
        """
        bounds = []
        for dim, (part, size) in enumerate(zip(index, slot.shape, strict=True)):
            if group is None and dim in storage.contracted:
                bounds.append((0, size))
            elif dim == storage.grouped:
                first, last, _ = part.indices(size // of_index)
                bounds.append((first * of_index, last * of_index))
            else:
                bounds.append(part.indices(size)[:2])
        return tuple(bounds)

    def quantised(bounds: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
        index = tuple(slice(*ends) for ends in bounds)
        chosen = views[index[0]] if slot.stacked else views
        made = [of_one.quantise(view[index[before:]], group) for view in chosen]
        values, scales = (np.stack(arrays) if slot.stacked else arrays[0] for arrays in zip(*made, strict=True))
        return values, scales

    def read_values(index: tuple[slice, ...]) -> np.ndarray:
        bounds = read_from(index, 2)
        values, scales_of[bounds] = quantised(bounds)
        if group is not None:
            return values
        return values[tuple(part if dim in storage.contracted else slice(None) for dim, part in enumerate(index))]

    def read_scales(index: tuple[slice, ...]) -> np.ndarray:
        bounds = read_from(index, group or 1)
        return scales_of[bounds] if bounds in scales_of else quantised(bounds)[1]

    values = from_parts(storage.values(slot.shape)[0], sharding, read_values)
    scales = from_parts(storage.scales(slot.shape)[0], slot.scales_sharding(sharding), read_scales)
    base.forget_pages()
    return slot.quantized(values, scales)


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
