"""The number of devices on each mesh axis. This module needs no JAX, so a driver can use it."""

import math
from dataclasses import dataclass

from kithara_ray.errors import ConfigError


@dataclass(frozen=True)
class MeshShape:
    """The number of devices on each axis. One axis may be -1: it takes the devices that the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            raise ConfigError(f"mesh axes must be >= 1, at most one of them -1, got {self}")

    def resolve(self, num_devices: int) -> tuple[int, int, int]:
        """Return the three sizes for `num_devices` devices."""
        sizes = (self.data, self.fsdp, self.tensor)
        known = math.prod(size for size in sizes if size != -1)
        left = num_devices // known if num_devices % known == 0 else -1
        data, fsdp, tensor = (left if size == -1 else size for size in sizes)
        if data * fsdp * tensor != num_devices:
            raise ConfigError(
                f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor} does not fit {num_devices} devices; "
                "their product must be the number of devices"
            )
        return data, fsdp, tensor
