"""Assemble whole arrays from sharded ones, without a gather on any host.

Each process gives the slices that its devices own, with their bounds. The process that collects them checks that they
tile every tensor exactly once, and joins them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kithara_ray.errors import AdapterError

if TYPE_CHECKING:  # a driver reads shards without JAX
    import jax

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shard:
    """One slice of one tensor.

    Attributes:
        name: the tensor's name.
        bounds: (start, stop) of each dim.
        data: the slice, in host memory.
        rank: the process that held it.
    """

    name: str
    bounds: Bounds
    data: np.ndarray
    rank: int


def local_shards(arrays: Mapping[str, "jax.Array"], rank: int) -> list[Shard]:
    """Return this process' part of global arrays. Only the first replica of a slice counts, so each is given once."""
    return [
        Shard(name, _bounds(shard.index, array.shape), np.asarray(shard.data), rank)
        for name, array in arrays.items()
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def assemble(shapes: Mapping[str, tuple[int, ...]], shards: Iterable[Shard], num_ranks: int) -> dict[str, np.ndarray]:
    """Join shards into whole tensors; the shards must tile each tensor exactly once.

    Args:
        shapes: the shape of every expected tensor.
        num_ranks: the number of processes that must send shards; used in the message if something is missing.

    Raises:
        AdapterError: a slice is missing, doubled, out of bounds or of the wrong shape, or a tensor is unknown. The
            message names the tensor, the slice and the rank.
    """
    by_name: dict[str, list[Shard]] = {name: [] for name in shapes}
    heard = set()
    for shard in shards:
        heard.add(shard.rank)
        if shard.name not in by_name:
            raise AdapterError(f"rank {shard.rank} sent {shard.name}, which is no tensor of this adapter")
        by_name[shard.name].append(shard)
    silent = sorted(set(range(num_ranks)) - heard)
    return {name: _tile(name, tuple(shapes[name]), own, silent) for name, own in by_name.items()}


def _tile(name: str, shape: tuple[int, ...], shards: list[Shard], silent: list[int]) -> np.ndarray:
    whole = np.empty(shape, shards[0].data.dtype if shards else np.float32)
    # The rank that wrote each element; -1 means none yet.
    owner = np.full(shape, -1, np.int32)
    for shard in shards:
        region = tuple(slice(start, stop) for start, stop in shard.bounds)
        expected = tuple(stop - start for start, stop in shard.bounds)
        if len(shard.bounds) != len(shape) or owner[region].shape != expected or shard.data.shape != expected:
            raise AdapterError(
                f"{name}: rank {shard.rank} sent a slice {_show(shard.bounds)} of shape {shard.data.shape}, "
                f"the tensor's shape is {shape}"
            )
        taken = owner[region].max(initial=-1)
        if taken != -1:
            raise AdapterError(
                f"{name}: slice {_show(shard.bounds)} came twice, from rank {taken} and rank {shard.rank}"
            )
        owner[region] = shard.rank
        whole[region] = shard.data
    if (owner == -1).any():
        first = tuple(int(i) for i in np.argwhere(owner == -1)[0])
        who = f"nothing came from rank {silent}" if silent else f"heard from ranks {sorted({s.rank for s in shards})}"
        raise AdapterError(f"{name}: {int((owner == -1).sum())} elements are missing, the first at {first}; {who}")
    return whole


def _show(bounds: Bounds) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in bounds) + "]"
