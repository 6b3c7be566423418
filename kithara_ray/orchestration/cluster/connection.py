"""The driver's connection to a Ray cluster."""

import logging
import os
import socket
import warnings

import ray

from kithara_ray.errors import ClusterError
from kithara_ray.orchestration.cluster import ray_compat

_ANSWER_S = 20.0
# Settings of Ray Train for runs on a cluster that this process starts: its one node is never announced to go, so no
# actor has to ask for that; and the controller sees within half a second, not two, that a run has ended.
_OWN_CLUSTER = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or the cluster of the job that this runs in, or start a local one.

    Raises:
        ClusterError: there is no cluster at RAY_ADDRESS.
    """
    if not ray.is_initialized():
        check_address()
        with warnings.catch_warnings():
            # Ray starts its processes by fork and exec, so they inherit nothing of this process's threads.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        if ray_compat.has_started_cluster():
            for name, value in _OWN_CLUSTER.items():
                os.environ.setdefault(name, value)


def check_address() -> None:
    """Raise ClusterError if nothing answers at RAY_ADDRESS. Ray itself would retry for minutes."""
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
