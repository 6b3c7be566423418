"""Facts that follow from the request only: devices, mesh, bytes of the base. None of them asks a cluster."""

import re

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts.positions import max_positions
from kithara_ray.hf.facts.vocabulary import embedding_rows
from kithara_ray.hf.resizing.tables import described
from kithara_ray.orchestration.cluster import capacity, ray_compat
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.sharding.shape import AXES, MeshShape, axes_told

# JAX devices of a chip, by Ray's name of the accelerator.
_DEVICES_OF_CHIP = {"TPU-V4": 1, "TPU-V5P": 1, "TPU-V5LITEPOD": 1, "TPU-V6E": 1, "TPU-V7X": 2}


def count_devices(request: RunRequest) -> int | None:
    """Return the number of JAX devices of the run; None if only the accelerator knows."""
    return devices_of(request.group)


def devices_of(group: WorkerGroup) -> int | None:
    """Return the number of JAX devices of a group; None if only the accelerator knows."""
    scaling, workers, env = group.scaling_config, group.num_workers, group.env()
    if env["JAX_PLATFORMS"].split(",")[0] == "cpu":
        found = re.search(r"--xla_force_host_platform_device_count=(\d+)", env.get("XLA_FLAGS", ""))
        return workers * int(found.group(1) if found else 1)
    if scaling.use_tpu and scaling.accelerator_type in _DEVICES_OF_CHIP:
        chips = int(workers * ray_compat.resources_per_worker(scaling).get("TPU", 0))
        return chips * _DEVICES_OF_CHIP[scaling.accelerator_type] or None
    return None


def mesh_axes(request: RunRequest) -> dict[str, int] | None:
    """Return the sizes of the mesh's axes, as the workers will lay it out; None if the devices are not known.

    Raises:
        ConfigError: the mesh does not fit the devices.
    """
    devices, group = count_devices(request), request.group
    if devices is None:
        return None
    slices = sum(capacity.slice_heads(group.scaling_config).values()) if group.platform == "tpu" else 0
    shape = request.step.mesh or MeshShape(data=int(slices) or 1)
    return axes_told(dict(zip(AXES, shape.resolve(devices), strict=True)))


def weight_bytes(request: RunRequest) -> int:
    """Return the bytes of the base's weight files, from their headers."""
    base = BaseCheckpoint.at(request.model.preset_handle)
    return sum(info.nbytes for info in base.tensors.values())


def vocabulary(request: RunRequest) -> int | None:
    """Return the number of tokens that the model knows: the rows of its embedding."""
    base = BaseCheckpoint.at(request.model.preset_handle)
    return embedding_rows(described(base, request.model.lora))


def positions_of(request: RunRequest) -> int | None:
    """Return the longest row, in tokens, that the base was made for; None if its config.json does not say."""
    return max_positions(BaseCheckpoint.at(request.model.preset_handle).config)
