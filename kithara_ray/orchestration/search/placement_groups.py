"""Placement groups of this job whose creator is gone: what the workers of a killed trial held, and nobody will free.

Ray frees a placement group when its job ends, or when its creator frees it. A trial that is stopped or killed takes the
controller of its run with it. Ray Train has an actor that looks for that, through the dashboard's server, which may be
absent or the wrong one's; the table of groups says it at once.
"""

import contextlib
import time

import ray
from ray.util.placement_group import remove_placement_group

from kithara_ray.orchestration.cluster import ray_compat

_POLL_S = 0.2


def groups() -> dict[bytes, bool]:
    """The placement groups that this job has: id -> whether an actor made it that is dead."""
    nobody = ray.ActorID.nil().binary()  # of a group that the driver made, whose maker Ray calls dead as well
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    table = ray_compat.placement_group_table()
    kept = [group for group in table if group.creator_job_id == job and not group.is_detached]
    return {
        group.placement_group_id: group.creator_actor_dead and group.creator_actor_id not in (b"", nobody)
        for group in kept
    }


def free() -> None:
    """Remove those whose creator is dead."""
    for group, orphaned in groups().items():
        if orphaned:
            with contextlib.suppress(ray.exceptions.RayError):
                remove_placement_group(ray_compat.placement_group_of(group))


def settle(before: set[bytes], timeout_s: float) -> bool:
    """Until no group is left but those `before`, or the time is over; returns whether none is."""
    deadline = time.monotonic() + timeout_s
    while True:
        free()
        if groups().keys() <= before:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
