"""Facts that follow from a request alone: devices, mesh, bytes of the base. None of them asks a cluster."""

import re

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.positions import max_positions
from kithara_ray.orchestration.cluster import capacity, ray_compat
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.sharding.shape import MeshShape

# A chip of these is one JAX device.
_ONE_DEVICE_A_CHIP = ("TPU-V4", "TPU-V5P", "TPU-V5LITEPOD", "TPU-V6E")


def count_devices(request: RunRequest) -> int | None:
    """JAX devices of the run; None where only the accelerator knows."""
    scaling, env = request.group.scaling_config, request.group.env()
    if env["JAX_PLATFORMS"].split(",")[0] == "cpu":
        found = re.search(r"--xla_force_host_platform_device_count=(\d+)", env.get("XLA_FLAGS", ""))
        return scaling.num_workers * int(found.group(1) if found else 1)
    if scaling.use_tpu and scaling.accelerator_type in _ONE_DEVICE_A_CHIP:
        return int(scaling.num_workers * ray_compat.resources_per_worker(scaling).get("TPU", 0)) or None
    return None


def mesh_axes(request: RunRequest) -> dict[str, int] | None:
    """Sizes of the mesh's axes, as the workers will lay it out; None where the devices are not known.

    Raises:
        ConfigError: the mesh does not fit the devices.
    """
    devices, group = count_devices(request), request.group
    if devices is None:
        return None
    slices = sum(capacity.slice_heads(group.scaling_config).values()) if group.platform == "tpu" else 0
    shape = request.step.mesh or MeshShape(data=int(slices) or 1)
    return dict(zip(("data", "fsdp", "tensor"), shape.resolve(devices), strict=True))


def weight_bytes(request: RunRequest) -> int:
    """Bytes of the base's weight files, by their headers."""
    base = BaseCheckpoint.at(request.model.preset_handle)
    return sum(info.nbytes for info in base.tensors.values())


def vocabulary(request: RunRequest) -> int | None:
    """Tokens that the base knows, by its config.json."""
    return BaseCheckpoint.at(request.model.preset_handle).config.get("vocab_size")


def positions_of(request: RunRequest) -> int | None:
    """Tokens of the longest row that the base was made for; None where its config.json does not say."""
    return max_positions(BaseCheckpoint.at(request.model.preset_handle).config)
