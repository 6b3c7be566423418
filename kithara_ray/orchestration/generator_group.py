"""`KerasHubModel.generate` on a group of workers, which share the weights or hold them whole, as in training."""

import logging
from dataclasses import dataclass
from typing import Any

from kithara_ray.orchestration.cluster.process_setup import check_process_group
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.generator import Request, Weights
from kithara_ray.orchestration.preflight.mesh import mesh_to_decode
from kithara_ray.orchestration.preflight.nodes import Nodes
from kithara_ray.orchestration.worker.entry import Entry, Loop, imported
from kithara_ray.sharding.shape import MeshShape

# The loop that each worker of a group imports and runs. Tests substitute their own loop.
GENERATE_LOOP: str | Loop = "kithara_ray.orchestration.generator_group:generate_loop"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupSpec:
    """One request to a group of workers; for `platform` and `num_workers` see `spec.RunSpec`."""

    weights: Weights
    request: Request
    mesh: MeshShape | None
    platform: str
    num_workers: int


def generate_on_group(group: WorkerGroup, weights: Weights, request: Request, mesh: MeshShape | None) -> Any:
    """Run `GENERATE_LOOP` in every worker of a group, and return rank 0's answer.

    Raises:
        ClusterError: the cluster lacks the group's resources, or a node does not answer.
    """
    group.wait()
    group.begin()
    if mesh is None:
        chosen = mesh_to_decode(group, weights.base, weights.lora, weights.precision, Nodes.of_cluster())
        if chosen is not None:
            logger.info("generate: %s", chosen.why())
            mesh = chosen.shape
    spec = GroupSpec(weights, request, mesh, group.platform, group.num_workers)
    return group.run(Entry(GENERATE_LOOP), {"spec": spec}).return_value


def generate_loop(config: dict[str, Any]) -> list[str] | list[list[int]]:
    """Run a worker's loop, see `worker.entry`: load the weights, answer and end. The group's answer is rank 0's."""
    spec: GroupSpec = config["spec"]
    check_process_group(spec.num_workers, spec.platform)
    return imported("kithara_ray.orchestration.decoding:Decoding")(spec.weights, spec.mesh).generate(spec.request)
