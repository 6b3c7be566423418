"""Calls to actors and tasks whose errors are our own."""

import os
import socket
from typing import Any

import ray

from kithara_ray.errors import ClusterError, KitharaRayError

_ANSWER_S = 20.0


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
    return next((node["NodeID"] for node in nodes if "node:__internal_head__" in node["Resources"]), None)


def check_address() -> None:
    """Raises ClusterError where nothing answers at RAY_ADDRESS: Ray itself would try for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    place = address.removeprefix("ray://")
    if place in ("", "auto", "local") or "://" in place:
        return
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterError(
            f"RAY_ADDRESS={address}: no cluster answers there ({error}); give HOST:PORT of its head, or unset it for a "
            "local one"
        ) from error
