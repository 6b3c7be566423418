"""Check that the copies of one array on several devices, and so on several hosts, have the same bits.

Every host reads the base by itself. An array, or a part of it, may be on more than one device. A host with a different
or damaged file would then train a different model than its peers, and no error would show it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from kithara_ray.errors import CheckpointError
from kithara_ray.sharding.mesh import named_sharding, replicated


def check_copies(mesh: Mesh, arrays: Mapping[str, jax.Array]) -> int:
    """Compare the checksums of all copies, and return the number of arrays compared.

    Every process calls this with its own part.

    Raises:
        CheckpointError: copies differ; the message names the array and two ranks.
    """
    # For each device, in the mesh's order: the part of the array that it holds.
    parts = {name: _parts(mesh, array) for name, array in arrays.items()}
    copied = [name for name in arrays if len(set(parts[name])) < mesh.size]
    if not copied:
        return 0
    ranks = [device.process_index for device in mesh.devices.flat]
    # The meshes of arrays hold the devices in one order, whatever their axes.
    by_mesh: dict[Mesh, list[str]] = {}
    for name in copied:
        own = named_sharding(arrays[name]).mesh
        assert isinstance(own, Mesh)  # arrays with values are on devices
        by_mesh.setdefault(own, []).append(name)
    for own, names in by_mesh.items():
        sums = np.asarray(_checksums(own, [arrays[name] for name in names]))
        for column, name in enumerate(names):
            _check(name, parts[name], sums[:, column].tolist(), ranks)
    return len(copied)


def _check(name: str, parts: Sequence[Any], sums: Sequence[int], ranks: Sequence[int]) -> None:
    """Check one array's checksums, one per device: equal parts must have equal sums."""
    first: dict[Any, int] = {}
    for row, part in enumerate(parts):
        other = first.setdefault(part, row)
        if sums[row] != sums[other]:
            raise CheckpointError(
                f"{name}: rank {ranks[row]} holds different bits from rank {ranks[other]}; the hosts have read "
                "different "
                "or damaged files: compare the base on the two, or delete its cached copy and let them fetch it again"
            )


def _parts(mesh: Mesh, array: jax.Array) -> list[tuple[tuple[int, int], ...]]:
    indices = array.sharding.devices_indices_map(array.shape)
    bounds = lambda index: tuple(s.indices(size)[:2] for s, size in zip(index, array.shape, strict=True))  # noqa: E731
    return [bounds(indices[device]) for device in mesh.devices.flat]


def _checksums(mesh: Mesh, arrays: list[jax.Array]) -> jax.Array:
    """Return checksums, uint32 (devices, arrays): each device computes those of its own parts."""

    def local(*blocks: jax.Array) -> jax.Array:
        return jnp.stack([_checksum(block) for block in blocks])[None]

    specs = tuple(named_sharding(array).spec for array in arrays)
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(mesh.axis_names), check_vma=False)
    return jax.jit(split, out_shardings=replicated(mesh))(*arrays)


def _checksum(block: jax.Array) -> jax.Array:
    """Return a checksum of the bits; an element's position counts, so a permutation changes it."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[block.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(block.reshape(-1), unsigned).astype(jnp.uint32)
    # The factors are odd, so no bit of any word is lost modulo 2**32.
    return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)


def agree(text: str) -> list[str]:
    """Return every process' text in order of ranks; all processes call this together."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray([len(raw)], np.int32))).reshape(-1)
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: len(raw)] = raw
    gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [bytes(row[:length]).decode() for row, length in zip(gathered, lengths, strict=True)]


class Ballot:
    """Combine one small number from each process, and a step's results, on the devices.

    Every process casts a vote in every step, and reads the same result two steps later. The devices never wait for a
    host to read, and all processes make the same decision at the same step.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size,)
        self._votes: dict[int, jax.Array] = {}

        def count(votes: jax.Array, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            return jnp.stack([jnp.max(votes), 1 - finite.astype(jnp.int32)])

        self._count = jax.jit(count, out_shardings=replicated(mesh))

    def cast(self, vote: int, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
        """Return int32 (2,): the highest vote of all processes, and 1 if the step's loss or gradient is not finite."""
        if vote not in self._votes:
            self._votes[vote] = jax.make_array_from_callback(
                self._shape, self._sharding, lambda index: np.full(self._shape, vote, np.int32)[index]
            )
        return self._count(self._votes[vote], loss, grad_norm)
