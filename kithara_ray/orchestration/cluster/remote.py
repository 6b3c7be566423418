"""Calls to actors and tasks whose errors are our own."""

from typing import Any

import ray

from kithara_ray.errors import KitharaRayError
from kithara_ray.orchestration.cluster.ray_compat import HEAD_NODE_RESOURCE


def remote_get(reference: Any) -> Any:
    """`ray.get`, with an error of our own raised as itself and not as Ray's wrapper of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, KitharaRayError):
            raise error.cause from None
        raise


def head_node_id() -> str | None:
    """Of the cluster's head; None when it has none by that name."""
    nodes = (node for node in ray.nodes() if node["Alive"])
    return next((node["NodeID"] for node in nodes if HEAD_NODE_RESOURCE in node["Resources"]), None)
