"""The default mesh on this cluster, for training and for decoding, decided before anything starts.

The rule is `plan.default_mesh`.
"""

import dataclasses
from collections.abc import Callable

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.resizing.tables import described
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.preflight.memory_fit import slice_of_run
from kithara_ray.orchestration.preflight.nodes import Nodes
from kithara_ray.orchestration.request.facts import devices_of
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.plan.default_mesh import DefaultMesh, decoding_bytes, default_mesh, state_bytes


def with_mesh(request: RunRequest, nodes: Nodes) -> RunRequest:
    """Return the request with the default mesh filled in, and the figures that it was chosen by.

    A request with a mesh is returned as it is. So is one whose devices have a memory that is not known: the workers
    then split the weights over the devices of a slice.

    Raises:
        ClusterError: a node does not answer.
    """
    if request.step.mesh is not None:
        return request
    model = request.model

    def state() -> int:
        base = described(BaseCheckpoint.at(model.weights_handle), model.lora)
        return state_bytes(base, model.lora, model.precision, model.quantize).total

    chosen = _mesh_of(request.group, state, nodes)
    if chosen is None:
        return request
    step = dataclasses.replace(request.step, mesh=chosen.shape)
    return dataclasses.replace(request, step=step, default_mesh=chosen.told())


def mesh_to_decode(
    group: WorkerGroup, base: str, lora: LoraConfig | None, precision: str, nodes: Nodes
) -> DefaultMesh | None:
    """Return the mesh by which a group decodes by default; None if the memory of its devices is not known.

    Args:
        base: handle or directory of the weights.
        lora, precision: as in `plan.default_mesh.decoding_bytes`.

    Raises:
        ClusterError: a node does not answer.
    """
    return _mesh_of(group, lambda: decoding_bytes(described(BaseCheckpoint.at(base), lora), lora, precision), nodes)


def _mesh_of(group: WorkerGroup, count_state: Callable[[], int], nodes: Nodes) -> DefaultMesh | None:
    """Return the default mesh of a group for a state of so many bytes; None if its devices' memory is not known."""
    device_bytes, slices = _device_bytes(group, nodes)
    return None if device_bytes is None else default_mesh(count_state(), device_bytes, slices)


def _device_bytes(group: WorkerGroup, nodes: Nodes) -> tuple[int | None, int]:
    """Return the memory of one device, None if it is not known, and the number of TPU slices.

    CPU devices share their host's memory: each gets the same part of what the host's workers have.
    """
    if group.platform == "cpu":
        ram, devices = nodes.ram_of_worker(group), devices_of(group)
        return (None if not ram or not devices else ram * group.num_workers // devices), 1
    planned = slice_of_run(group.scaling_config, group.platform)
    if planned is None or planned[0].chip is None:
        return None, 1
    return planned[0].chip.hbm_bytes, int(planned[1]) or 1
