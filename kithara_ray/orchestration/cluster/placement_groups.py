"""Placement groups of this job whose creator is dead: workers of a killed run held them, and nothing frees them.

Ray frees a placement group when its job ends, or when its creator frees it. A trial that is stopped or killed takes the
controller of its run with it. Ray Train has an actor that looks for such groups through the dashboard's server. That
server may be absent or belong to another cluster, and the actor's process takes seconds to start; the table of groups
is always available.
"""

import contextlib
import time

import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group

from kithara_ray.orchestration.cluster import ray_compat

_POLL_S = 0.2


def groups() -> dict[bytes, bool]:
    """Return the placement groups of this job: id -> True if a dead actor created it."""
    nobody = ray.ActorID.nil().binary()  # creator of a group that the driver made; Ray reports it as dead as well
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    table = ray_compat.placement_group_table()
    kept = [group for group in table if group.creator_job_id == job and not group.is_detached]
    return {
        group.placement_group_id: group.creator_actor_dead and group.creator_actor_id not in (b"", nobody)
        for group in kept
    }


def free() -> None:
    """Remove the groups whose creator is dead."""
    for group, orphaned in groups().items():
        if orphaned:
            with contextlib.suppress(RayError):
                remove_placement_group(ray_compat.placement_group_of(group))


def settle(before: set[bytes], timeout_s: float) -> bool:
    """Wait until only the groups in `before` are left, or `timeout_s` is over; return True if none else is left."""
    deadline = time.monotonic() + timeout_s
    while True:
        free()
        if groups().keys() <= before:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
