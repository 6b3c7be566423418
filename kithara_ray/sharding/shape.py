"""The number of devices on each mesh axis. This module needs no JAX, so a driver can use it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kithara_ray.errors import ConfigError

# The axes in the order in which a mesh has them.
AXES = ("data", "fsdp", "expert", "tensor")


def axes_told(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of a mesh's axes for a reader: without `expert` if it splits nothing."""
    return {axis: sizes[axis] for axis in AXES if axis != "expert" or sizes[axis] != 1}


@dataclass(frozen=True)
class MeshShape:
    """The number of devices on each axis. One axis may be -1: it takes the devices that the others leave.

    `expert` is for mixtures of experts, and must divide their number; see `sharding.mesh`.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            raise ConfigError(f"mesh axes must be >= 1, at most one of them -1, got {self}")

    def resolve(self, num_devices: int) -> tuple[int, ...]:
        """Return the sizes in the order of AXES for `num_devices` devices."""
        sizes = [getattr(self, axis) for axis in AXES]
        known = math.prod(size for size in sizes if size != -1)
        left = num_devices // known if num_devices % known == 0 else -1
        found = tuple(left if size == -1 else size for size in sizes)
        if math.prod(found) != num_devices:
            given = " ".join(f"{axis}={size}" for axis, size in axes_told(vars(self)).items())
            raise ConfigError(
                f"mesh {given} does not fit {num_devices} devices; their product must be the number of devices"
            )
        return found
