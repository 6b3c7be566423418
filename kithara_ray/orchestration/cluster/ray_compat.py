"""Every private name of Ray that this library uses: one function each, with the reason in its docstring.

The private names of Ray Train, whose import takes a second in each process, are in `ray_train_compat`. No other module
may touch a private name; tests/test_private_names.py enforces that. If Ray drops a name,
tests/orchestration/cluster/test_ray_compat.py reports which one is gone, and its purpose.

Each function imports its part of Ray when it is called, because a task that reads rows needs none of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# The resource that marks the head node. `ray._common.constants` defines it. No public name does, and no public call
# identifies the head node.
HEAD_NODE_RESOURCE = "node:__internal_head__"

# --- the cluster -----------------------------------------------------------------------------------------------------


def has_started_cluster() -> bool:
    """Return True if this process has started the cluster that it is connected to.

    Needed because `ray.init` without an address either joins a cluster of this machine or starts one, and does not
    return which.
    """
    from ray._private import worker

    return worker._global_node is not None and worker._global_node.head


def free_by_node() -> dict[str, dict[str, float]]:
    """Return node id -> the free resources of the node.

    Needed to find the room for whole workers; `ray.available_resources()` is the sum over all nodes.
    """
    from ray._private import state

    return state.available_resources_per_node()


def tpu_pod_type(topology: str, accelerator_type: str) -> str | None:
    """Return Ray's name for a TPU slice of this shape, which appears in the resource of the slice's head.

    Needed to request whole slices before a group is started; Ray Train makes the same name internally.
    """
    from ray._private.accelerators.tpu import infer_tpu_pod_type_from_topology

    return infer_tpu_pod_type_from_topology(topology, accelerator_type)


def host_memory() -> tuple[int, int]:
    """Return (total, used) bytes of this host's memory, within a container's limit.

    Needed because psutil and /proc do not know the limit. Ray's dashboard does, but it may be absent.
    """
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    return get_system_memory(), get_used_memory()


def resources_per_worker(scaling: Any) -> Mapping[str, float]:
    """Return the resources that a worker of a ScalingConfig requests, with Ray's defaults filled in.

    Needed to compare with the nodes' resources; the public `resources_per_worker` is None if the user left it out.
    """
    return scaling._resources_per_worker_not_none


# --- placement groups ------------------------------------------------------------------------------------------------


def placement_group_table() -> list[Any]:
    """Return the cluster's placement groups as Ray's own records, without removed ones.

    Needed because `ray.util.placement_group_table` does not report whether a group's creator is dead.
    """
    from ray._private import state
    from ray.core.generated import gcs_pb2

    messages: Any = gcs_pb2  # its classes are made at run time
    data = messages.PlacementGroupTableData
    accessor = state.state._connect_and_get_accessor()
    records = [data.FromString(row) for row in accessor.get_placement_group_table()]
    return [record for record in records if record.state != data.REMOVED]


def placement_group_of(group_id: bytes) -> Any:
    """Return a handle on a placement group that another process made.

    Needed to remove a group whose creator is dead. The public `get_placement_group` finds groups by name; these have
    none.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    return PlacementGroup(PlacementGroupID(group_id))


# --- Ray Data --------------------------------------------------------------------------------------------------------


def block_refs(dataset: Any) -> Iterator[tuple[Any, int, int]]:
    """Yield (reference, rows, bytes) of each block of a dataset, in order, as the blocks are made.

    Needed to hand blocks to tasks without bringing them here. `get_internal_block_refs` is no less internal, gives
    neither rows nor sizes, and makes all blocks first.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield entry.ref, entry.metadata.num_rows, entry.metadata.size_bytes or 0


# --- Ray Tune --------------------------------------------------------------------------------------------------------


def limits_by_itself(limiter: Any) -> bool:
    """Return True if a ConcurrencyLimiter counts trials itself, instead of its searcher.

    Needed to pass on a trial's reports as the limiter does; the limiter does not expose this.
    """
    return limiter._limit_concurrency


def only_stops(rule: Any) -> bool:
    """Return True if a MedianStoppingRule stops trials instead of pausing them; also True for other schedulers.

    Needed to refuse rules that pause trials; the rule's `hard_stop` cannot be read after it is made.
    """
    return getattr(rule, "_hard_stop", True)


def set_time_slice(rule: Any, seconds: float) -> None:
    """Let a MedianStoppingRule run a trial for `seconds` before another trial may take its place.

    Needed for a rule that the user made; `min_time_slice` is an argument of the constructor only.
    """
    rule._min_time_slice = seconds


def rungs_of(asha: Any) -> list[list[dict[str, float]]]:
    """Return an ASHAScheduler's records, trial -> metric, by bracket and rung: its own dicts, which may be updated.

    Needed to resume a search; Ray Tune saves the trials but not the scheduler's records of them.
    """
    return [[recorded for _, recorded in bracket._rungs] for bracket in asha._brackets]


# --- packages of a job -----------------------------------------------------------------------------------------------


def walk_package(directory: Path, excludes: Sequence[str], visit: Callable[[Path], None]) -> None:
    """Call `visit` with each path that Ray would put into the package of a working directory.

    Needed to report files that are too large before anything is sent. Ray reports this only after packing, without
    sizes.
    """
    from ray._private.runtime_env import packaging

    rules = [packaging._get_excludes(directory, list(excludes))]
    packaging._dir_travel(directory, rules, visit, include_gitignore=True)


def write_package(directory: Path, excludes: Iterable[str], target: Path) -> None:
    """Write the package itself, as a zip file.

    Needed to know the package's size; `JobSubmissionClient` makes it only while it uploads.
    """
    from ray._private.runtime_env import packaging

    packaging.create_package(str(directory), target, include_gitignore=True, excludes=list(excludes))
