"""The default mesh of a run on this cluster, decided before anything starts; the rule is `plan.default_mesh`."""

import dataclasses

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.orchestration.preflight.memory_fit import slice_of_run
from kithara_ray.orchestration.preflight.nodes import Nodes
from kithara_ray.orchestration.request.facts import count_devices
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.plan.default_mesh import default_mesh, state_bytes


def with_mesh(request: RunRequest, nodes: Nodes) -> RunRequest:
    """Return the request with the default mesh filled in, and the figures that it was chosen by.

    A request with a mesh is returned as it is. So is one whose devices have a memory that is not known: the workers
    then split the weights over the devices of a slice.

    Raises:
        ClusterError: a node does not answer.
    """
    if request.step.mesh is not None:
        return request
    device_bytes, slices = _device_bytes(request, nodes)
    if device_bytes is None:
        return request
    model = request.model
    state = state_bytes(BaseCheckpoint.at(model.weights_handle), model.lora, model.precision, model.quantize)
    chosen = default_mesh(state.total, device_bytes, slices)
    step = dataclasses.replace(request.step, mesh=chosen.shape)
    return dataclasses.replace(request, step=step, default_mesh=chosen.told())


def _device_bytes(request: RunRequest, nodes: Nodes) -> tuple[int | None, int]:
    """Return the memory of one device, None if it is not known, and the number of TPU slices.

    CPU devices share their host's memory: each gets the same part of what the host's workers have.
    """
    group = request.group
    if group.platform == "cpu":
        ram, devices = nodes.ram_of_worker(group), count_devices(request)
        return (None if not ram or not devices else ram * group.num_workers // devices), 1
    planned = slice_of_run(group.scaling_config, group.platform)
    if planned is None or planned[0].chip is None:
        return None, 1
    return planned[0].chip.hbm_bytes, int(planned[1]) or 1
