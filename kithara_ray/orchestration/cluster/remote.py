"""Calls to actors and tasks that raise this library's own errors."""

from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayTaskError

from kithara_ray.errors import KitharaRayError
from kithara_ray.orchestration.cluster.ray_compat import HEAD_NODE_RESOURCE


def pickled(value: Any) -> bytes:
    """Pickle a value as Ray does: also functions of a script, and closures."""
    pickle: Any = cloudpickle
    return pickle.dumps(value)


def unpickled(data: bytes) -> Any:
    """Return the value that `pickled` wrote."""
    pickle: Any = cloudpickle
    return pickle.loads(data)


def remote_get(reference: Any) -> Any:
    """Call `ray.get`, and raise this library's errors as themselves, not in Ray's wrapper."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, KitharaRayError):
            raise error.cause from None
        raise


def head_node_id() -> str | None:
    """Return the id of the cluster's head node; None if no node is marked as the head."""
    nodes = (node for node in ray.nodes() if node["Alive"])
    return next((node["NodeID"] for node in nodes if HEAD_NODE_RESOURCE in node["Resources"]), None)
