"""The device mesh and how every array is split over it.

Axes (`axis` is a mesh axis, `dim` a tensor dimension):

    data    across slices: weights replicated, batch split
    fsdp    within a slice: weights, factors, optimizer state and batch split
    tensor  within a slice: weights split, batch not
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kithara_ray.errors import ConfigError
from kithara_ray.sharding.shape import MeshShape

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Below this many elements the latency of a gather costs more than the memory of a copy.
_REPLICATE_BELOW = 2048


def make_mesh(shape: MeshShape | None = None, devices: Sequence | None = None) -> Mesh:
    """A mesh over all devices of all processes, in the order in which JAX lays out the topology.

    Without a shape, `data` counts the TPU slices and `fsdp` has the devices of one: between slices the network is slow,
    and over `data` nothing but the factors' gradients is reduced.

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
        grid = mesh_utils.create_hybrid_device_mesh((data // slices, *inner), (slices, 1, 1), devices)
    return Mesh(grid, AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; positions whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def weight_sharding(mesh: Mesh, shape: Sequence[int], whole_dims: int = 0, prefer: Sequence[int] = ()) -> NamedSharding:
    """The layout of one weight: `fsdp` and `tensor` together split one of its dims that divides evenly.

    Args:
        shape: the weight's shape.
        whole_dims: so many leading dims stay whole (the dim of stacked blocks).
        prefer: dims to split, the first of them that divides; else the largest that does.

    A vector (a norm's scale, a bias), and any weight under 2048 elements, is replicated.

    Raises:
        ConfigError: no dim of a larger weight divides evenly.
    """
    axes = tuple(axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    dims = range(whole_dims, len(shape))
    if not axes or len(dims) < 2 or math.prod(shape[dim] for dim in dims) < _REPLICATE_BELOW:
        return replicated(mesh)
    candidates = [dim for dim in dims if shape[dim] % ways == 0]
    if not candidates:
        raise ConfigError(
            f"a weight of shape {tuple(shape)} cannot be split evenly {ways} ways "
            f"(fsdp={mesh.shape['fsdp']} x tensor={mesh.shape['tensor']}): no dim is a multiple of {ways}; "
            "choose another mesh or number of devices"
        )
    largest = max(candidates, key=lambda dim: shape[dim])
    dim = next((dim for dim in prefer if dim in candidates), largest)
    spec = [None] * len(shape)
    spec[dim] = axes
    return NamedSharding(mesh, PartitionSpec(*spec))


def factor_sharding(mesh: Mesh, shape: Sequence[int], whole_dims: int = 0) -> NamedSharding:
    """A LoRA factor or an optimizer array is split like a weight where a dim divides evenly, else replicated."""
    try:
        return weight_sharding(mesh, shape, whole_dims)
    except ConfigError:
        return replicated(mesh)
