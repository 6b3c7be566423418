"""The total and free resources of the cluster for a group of workers, and a wait for them."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import ray

from kithara_ray.errors import ClusterError
from kithara_ray.orchestration.cluster import ray_compat

logger = logging.getLogger(__name__)

_POLL_S = 1.0


def placeable(workers: int, needs: Mapping[str, float], nodes: list[Mapping[str, float]]) -> int:
    """Return how many of `workers` equal workers fit onto nodes with these resources."""
    fits = 0
    for node in nodes:
        per_node = [int(node.get(name, 0) / amount + 1e-9) for name, amount in needs.items() if amount > 0]
        fits += min(per_node, default=workers)
    return min(fits, workers)


def wait_for_cluster(workers: int, needs: Mapping[str, float], timeout_s: float, extra: Mapping[str, float]) -> None:
    """Wait until the cluster has nodes for all workers, with the needed resources free.

    Args:
        needs: resources of one worker.
        timeout_s: seconds to wait for nodes (from an autoscaler, or from another job that ends).
        extra: resources that must exist once, e.g. the head of a TPU slice.

    Raises:
        ClusterError: resources are missing; the message names them.
    """
    deadline = time.monotonic() + timeout_s
    told = False
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        problem = _missing(workers, needs, extra, nodes) or _busy(workers, needs)
        if problem is None:
            return
        if time.monotonic() >= deadline:
            raise ClusterError(f"{problem}; waited {timeout_s:g} s (Trainer(cluster_timeout_s=...))")
        if not told:
            logger.info("waiting for the cluster: %s", problem)
            told = True
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))


def _missing(workers: int, needs: Mapping[str, float], extra: Mapping[str, float], nodes: list) -> str | None:
    for name, amount in extra.items():
        if sum(node.get(name, 0) for node in nodes) < amount:
            slices = sorted({key for node in nodes for key in node if key.startswith("TPU-") and key.endswith("-head")})
            return f"the cluster has no {name!r} (a whole TPU slice of that shape); it has {slices or 'no TPU slice'}"
    found = placeable(workers, needs, nodes)
    if found < workers:
        return (
            f"the cluster can hold {found} of {workers} workers that need {show(needs)} each; "
            f"it has {len(nodes)} node(s): {'; '.join(show(node) for node in nodes)}"
        )
    return None


def _busy(workers: int, needs: Mapping[str, float]) -> str | None:
    free = ray.available_resources()
    for name, amount in needs.items():
        if free.get(name, 0) + 1e-9 < amount * workers:
            return (
                f"{workers} workers need {amount * workers:g} {name}, of which {free.get(name, 0):g} are free now; "
                "another job or actor holds the rest"
            )
    return None


def show(resources: Mapping[str, Any]) -> str:
    """Format resources for a person to read."""
    shown = {k: v for k, v in resources.items() if not k.startswith(("node:", "memory", "object_store_memory"))}
    return ", ".join(f"{name}: {amount:g}" for name, amount in sorted(shown.items())) or "nothing"


def workers_of(scaling: Any) -> int:
    """Return the number of workers; a range of them has been refused by then."""
    assert isinstance(scaling.num_workers, int), scaling.num_workers
    return scaling.num_workers


def slice_heads(scaling: Any) -> dict[str, float]:
    """Return the resources that mark whole TPU slices of the requested shape, one per slice; none without `use_tpu`."""
    if not (scaling.use_tpu and scaling.topology and scaling.accelerator_type):
        return {}
    from ray.util.tpu import get_tpu_num_slices_for_workers

    pod_type = ray_compat.tpu_pod_type(scaling.topology, scaling.accelerator_type)
    slices = get_tpu_num_slices_for_workers(
        topology=scaling.topology,
        accelerator_type=scaling.accelerator_type,
        num_workers=scaling.num_workers,
        resources_per_worker=scaling.resources_per_worker,
    )
    return {f"TPU-{pod_type}-head": slices}
