"""The device mesh, and the split of every array over it.

Axes (`axis` is a mesh axis, `dim` a tensor dimension):

    data    across slices: weights replicated, batch split
    fsdp    within a slice: weights, factors, optimizer state and batch split
    expert  within a slice: as fsdp; of a mixture's experts each device has some, and tokens are sent to them
    tensor  within a slice: weights split, batch not
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kithara_ray.errors import ConfigError
from kithara_ray.sharding.shape import AXES, MeshShape

BATCH_AXES = ("data", "fsdp", "expert")
# Axes that split weights, and those of them over which a block gathers its weights before it computes.
WEIGHT_AXES = ("fsdp", "expert", "tensor")
GATHERED_AXES = ("fsdp", "expert")
# Below this many elements the latency of a gather costs more than the memory of a copy.
_REPLICATE_BELOW = 2048


def make_mesh(shape: MeshShape | None = None, devices: Sequence | None = None) -> Mesh:
    """Make a mesh over all devices of all processes, in the order in which JAX lays out the topology.

    Without a shape, `data` counts the TPU slices and `fsdp` the devices of one slice. The network between slices is
    slow, and only the factors' gradients are reduced over `data`.

    Raises:
        ConfigError: the shape does not fit the devices, or splits weights between slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, *inner = (shape or MeshShape(data=slices)).resolve(len(devices))
    if data % slices:
        raise ConfigError(
            f"mesh data={data} over {slices} TPU slices: weights would be gathered between slices at every block; "
            f"take a multiple of {slices} for data, or leave the mesh out"
        )
    if devices[0].platform != "tpu":
        grid = np.array(devices).reshape(data, *inner)
    elif slices == 1:
        grid = mesh_utils.create_device_mesh((data, *inner), devices)
    else:
        grid = mesh_utils.create_hybrid_device_mesh((data // slices, *inner), (slices, 1, 1, 1), devices)
    return Mesh(grid, AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return a sharding that splits rows over `data`, `fsdp` and `expert`, and keeps positions whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def weight_sharding(
    mesh: Mesh,
    shape: Sequence[int],
    whole_dims: int = 0,
    prefer: Sequence[int] = (),
    parts: Sequence[int] | None = None,
    experts: int | None = None,
) -> NamedSharding:
    """Return the layout of one weight: `fsdp`, `expert` and `tensor` together split one dim.

    A vector (a norm's scale, a bias) is replicated, and so is any weight under 2048 elements. A weight without a dim
    that divides evenly is split over as many devices as divide one of its dims, and copied over the rest.

    Args:
        shape: the weight's shape.
        whole_dims: the number of leading dims that stay whole (the dim of stacked blocks).
        prefer: dims to try first; the first that divides evenly is split, else the largest dim that does.
        parts: for each dim, the number of equal parts that it may be cut into; one for each element by default.
        experts: the dim of a mixture's experts, which `expert` splits; `fsdp` and `tensor` split another. None if the
            weight has no such dim.

    Returns:
        A layout on this mesh; on a mesh of the same devices with the axis `copies` if the weight is copied.
    """
    parts = shape if parts is None else parts
    if experts is not None and mesh.shape["expert"] > 1:
        return _experts_sharding(mesh, shape, parts, prefer, experts)
    dims = range(whole_dims, len(shape))
    return _even_sharding(mesh, shape, parts, dims, prefer) or _uneven_sharding(mesh, parts, whole_dims)


def factor_sharding(mesh: Mesh, shape: Sequence[int], whole_dims: int = 0) -> NamedSharding:
    """Split a LoRA factor or an optimizer array like a weight if a dim divides evenly; else replicate it."""
    return _even_sharding(mesh, shape, shape, range(whole_dims, len(shape)), ()) or replicated(mesh)


def split_on(mesh: Mesh, sharding: NamedSharding) -> tuple[tuple[str, ...], ...]:
    """Return the axes of this mesh that split each dim of an array.

    A weight that is copied over a part of `fsdp` is not split by the whole of it: for such a weight this is `tensor`
    alone, or nothing.
    """
    names = [(axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in sharding.spec]
    if sharding.mesh == mesh:
        return tuple(names)
    return tuple(tuple(axis for axis in axes if axis == "tensor") for axes in names)


def _even_sharding(
    mesh: Mesh,
    shape: Sequence[int],
    parts: Sequence[int],
    dims: Sequence[int],
    prefer: Sequence[int],
    among: Sequence[str] = WEIGHT_AXES,
) -> NamedSharding | None:
    """The layout of a small weight, or one that these axes split evenly in one of these dims; None for any other."""
    axes = tuple(axis for axis in among if mesh.shape[axis] > 1)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if not axes or len(dims) < 2 or math.prod(shape[dim] for dim in dims) < _REPLICATE_BELOW:
        return replicated(mesh)
    candidates = [dim for dim in dims if parts[dim] % ways == 0]
    if not candidates:
        return None
    largest = max(candidates, key=lambda dim: shape[dim])
    dim = next((dim for dim in prefer if dim in candidates), largest)
    return NamedSharding(mesh, PartitionSpec(*(axes if each == dim else None for each in range(len(shape)))))


def _experts_sharding(
    mesh: Mesh, shape: Sequence[int], parts: Sequence[int], prefer: Sequence[int], experts: int
) -> NamedSharding:
    """Split the experts over `expert`, and each of them over `fsdp` and `tensor`, or not at all."""
    dims = range(experts + 1, len(shape))
    inner = _even_sharding(mesh, shape, parts, dims, prefer, ("fsdp", "tensor")) or replicated(mesh)
    spec = [*inner.spec, *[None] * (len(shape) - len(inner.spec))]
    spec[experts] = "expert"
    return NamedSharding(mesh, PartitionSpec(*spec))


def _uneven_sharding(mesh: Mesh, parts: Sequence[int], whole_dims: int) -> NamedSharding:
    """Split the dim that most devices divide evenly, over `tensor` if it can be, and a part of `fsdp` and `expert`."""
    data, fsdp, expert, tensor = (mesh.shape[axis] for axis in AXES)

    def ways(dim: int) -> tuple[int, int]:
        by_tensor = tensor if parts[dim] % tensor == 0 else 1
        return math.gcd(fsdp * expert, parts[dim] // by_tensor), by_tensor

    dim = max(range(whole_dims, len(parts)), key=lambda dim: (math.prod(ways(dim)), parts[dim]))
    by_fsdp, by_tensor = ways(dim)
    if by_fsdp * by_tensor == 1:
        return replicated(mesh)
    # The devices stand in the same order as on the mesh.
    grid = mesh.devices.reshape(data, by_fsdp, fsdp * expert // by_fsdp, tensor)
    axes = tuple(axis for axis, count in (("fsdp", by_fsdp), ("tensor", by_tensor)) if count > 1)
    spec = PartitionSpec(*(axes if each == dim else None for each in range(len(parts))))
    return NamedSharding(Mesh(grid, ("data", "fsdp", "copies", "tensor")), spec)


def from_parts(
    shape: Sequence[int], sharding: NamedSharding, part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Make a global array; `part` returns the elements at an index, for each part that this process' devices own."""

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return part(index)

    return jax.make_array_from_callback(tuple(shape), sharding, read)


def named_sharding(array: jax.Array) -> NamedSharding:
    """Return the layout of a global array that this library placed."""
    assert isinstance(array.sharding, NamedSharding), array.sharding
    return array.sharding
