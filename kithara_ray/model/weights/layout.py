"""Positions of a weight's elements in its Hugging Face tensors: the inverse of the recorded transforms.

A transform, applied to a mapped tensor, gives a view. The view's strides state where each element of the variable lies
in the file, so they also give the inverse. There is no table, and no tensor is read.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from kithara_ray.errors import UnsupportedError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.trained import TensorSlice, checksum
from kithara_ray.model.weights.slots import Port, Slot

# Size limit of one slice that is sent; a single larger row is sent whole.
SLICE_BYTES = 16 << 20


@dataclass(frozen=True)
class Layout:
    """Position of a variable's elements in one HF tensor.

    Attributes:
        shape: the tensor's shape, its dims split until each is a dim of the variable: (N, H, D) for (N * H, D).
        order: dim i of `shape` is dim order[i] of the variable.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]


def layout_of(view: np.ndarray, tensor: np.ndarray, name: str) -> Layout:
    """Derive the layout from the view that a transform has made of a whole tensor.

    Raises:
        UnsupportedError: the transform does more than reorder all of the tensor's elements.
    """
    # Dims of size 1 may have any stride.
    order = sorted(range(view.ndim), key=lambda dim: (view.shape[dim] != 1, -view.strides[dim]))
    shape = tuple(view.shape[dim] for dim in order)
    step, expected = tensor.itemsize, []
    for size in reversed(shape):
        expected.insert(0, step)
        step *= size
    same = all(size == 1 or view.strides[dim] == e for dim, size, e in zip(order, shape, expected, strict=True))
    starts = view.__array_interface__["data"][0], tensor.__array_interface__["data"][0]
    if not same or view.size != tensor.size or starts[0] != starts[1]:
        raise UnsupportedError(
            f"{name}: KerasHub's converter does more to it than reorder its elements, so trained values cannot be "
            "written back; give lora_rank="
        )
    return Layout(shape, tuple(order))


@dataclass(frozen=True)
class _Source:
    """A slice before its bytes are copied: a box of one device's part of a slot's array."""

    name: str
    layout: Layout
    bounds: tuple[tuple[int, int], ...]
    data: jax.Array
    start: tuple[int, ...]
    stacked: bool

    def cut(self, slice_bytes: int) -> Iterator["_Source"]:
        """Yield parts along the layout's first dim that is longer than 1, each within `slice_bytes`."""
        sizes = [stop - start for start, stop in self.bounds]
        dim = next((dim for dim, size in enumerate(sizes) if size > 1), None)
        row_bytes = math.prod(sizes) * self.data.dtype.itemsize // (sizes[dim] if dim is not None else 1)
        rows = max(1, slice_bytes // row_bytes)
        if dim is None or sizes[dim] <= rows:
            yield self
            return
        first, last = self.bounds[dim]
        own = self.layout.order[dim] + self.stacked
        for begin in range(first, last, rows):
            bounds = (*self.bounds[:dim], (begin, min(begin + rows, last)), *self.bounds[dim + 1 :])
            start = (*self.start[:own], self.start[own] + begin - first, *self.start[own + 1 :])
            yield from _Source(self.name, self.layout, bounds, self.data, start, self.stacked).cut(slice_bytes)

    def read(self, rank: int) -> TensorSlice:
        """Copy the slice, and nothing else, from the device; its bytes are in the tensor's order."""
        sizes = [0] * len(self.bounds)
        for dim, (begin, end) in zip(self.layout.order, self.bounds, strict=True):
            sizes[dim] = end - begin
        box = jax.lax.dynamic_slice(self.data, self.start, [1] * self.stacked + sizes)
        data = np.asarray(box).reshape(sizes).transpose(self.layout.order)
        data = np.ascontiguousarray(data)
        return TensorSlice(self.name, self.layout.shape, self.bounds, data, rank, checksum(data))


def local_slices(
    base: BaseCheckpoint, slots: Sequence[Slot], arrays: Sequence[jax.Array], rank: int, slice_bytes: int = SLICE_BYTES
) -> Iterator[TensorSlice]:
    """Yield this process's part of a model's weights, in the order of the base's files.

    Only the first of several copies is included. One slice at a time is copied to the host.
    """
    sources = []
    for slot, array in zip(slots, arrays, strict=True):
        layouts = [_layout_of_port(base, port) for port in slot.ports]
        for shard in array.addressable_shards:
            if shard.replica_id != 0:
                continue
            spans = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True)]
            steps, own = (range(*spans[0]), spans[1:]) if slot.stacked else (range(1), spans)
            for step in steps:
                start = ((step - steps.start,) if slot.stacked else ()) + (0,) * len(own)
                layout = layouts[step]
                bounds = tuple(own[dim] for dim in layout.order)
                name = slot.ports[step].hf_name
                sources.append(_Source(name, layout, bounds, shard.data, start, slot.stacked))
    infos = base.tensors
    sources.sort(key=lambda source: (infos[source.name].file, infos[source.name].offset))
    for source in sources:
        for part in source.cut(slice_bytes):
            yield part.read(rank)


def _layout_of_port(base: BaseCheckpoint, port: Port) -> Layout:
    view = port.view(base)
    assert isinstance(view, np.ndarray)  # `check_invertible` refuses others
    return layout_of(view, base.view(port.hf_name), port.hf_name)
