"""Every private name of Ray that this library uses: one function each, its reason in its docstring.

Those of Ray Train, whose import takes a second in each process, are in `ray_train_compat`. No other module may touch
one; tests/test_private_names.py holds that. tests/orchestration/cluster/test_ray_compat.py says in words which name is
gone when Ray drops it, and what it was for.

What is imported of Ray here is imported where it is used: a task that reads rows needs none of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

# The resource that marks the head node. `ray._common.constants` has it; no public name does, and no public call says
# which node is the head.
HEAD_NODE_RESOURCE = "node:__internal_head__"

# --- the cluster -----------------------------------------------------------------------------------------------------


def free_by_node() -> dict[str, dict[str, float]]:
    """Node id -> the resources that are free there now.

    Needed to find the room for whole workers; `ray.available_resources()` is the sum over all nodes.
    """
    return ray._private.state.available_resources_per_node()


def tpu_pod_type(topology: str, accelerator_type: str) -> str | None:
    """The name that Ray gives a TPU slice of this shape in the resource of its head.

    Needed to ask for whole slices before a group is started; Ray Train makes the same name inside.
    """
    from ray._private.accelerators.tpu import infer_tpu_pod_type_from_topology

    return infer_tpu_pod_type_from_topology(topology, accelerator_type)


def host_memory() -> tuple[int, int]:
    """(all, used) bytes of this host's memory, within a container's limit.

    Needed because psutil and /proc do not know the limit, and Ray's dashboard, which does, may be absent.
    """
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    return get_system_memory(), get_used_memory()


def resources_per_worker(scaling: Any) -> Mapping[str, float]:
    """What a worker of a ScalingConfig asks for, Ray's defaults filled in.

    Needed to compare with what nodes have; the public `resources_per_worker` is None where a user left it out.
    """
    return scaling._resources_per_worker_not_none


# --- placement groups ------------------------------------------------------------------------------------------------


def placement_group_table() -> list[Any]:
    """The cluster's placement groups as Ray's own records, those that were removed left out.

    Needed because `ray.util.placement_group_table` does not say whether a group's creator is dead.
    """
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    accessor = ray._private.state.state._connect_and_get_accessor()
    records = [PlacementGroupTableData.FromString(row) for row in accessor.get_placement_group_table()]
    return [record for record in records if record.state != PlacementGroupTableData.REMOVED]


def placement_group_of(group_id: bytes) -> Any:
    """A handle on a placement group that another process made.

    Needed to remove one whose creator is dead; the public `get_placement_group` finds groups by name, these have none.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    return PlacementGroup(PlacementGroupID(group_id))


# --- Ray Data --------------------------------------------------------------------------------------------------------


def block_refs(dataset: Any) -> Iterator[tuple[Any, int, int]]:
    """(reference, rows, bytes) of each block of a dataset, in order, as they are made.

    Needed to hand blocks to tasks without bringing them here; `get_internal_block_refs` is no less internal and gives
    neither rows nor sizes, and makes all blocks first.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield entry.ref, entry.metadata.num_rows, entry.metadata.size_bytes or 0


# --- Ray Tune --------------------------------------------------------------------------------------------------------


def limits_by_itself(limiter: Any) -> bool:
    """Whether a ConcurrencyLimiter counts trials, and not its searcher.

    Needed to pass on what a trial reports as the limiter does; it keeps this to itself.
    """
    return limiter._limit_concurrency


def only_stops(rule: Any) -> bool:
    """Whether a MedianStoppingRule stops trials, and does not pause them; true of a scheduler without that choice.

    Needed to refuse what pauses trials; the rule's `hard_stop` is not readable after it is made.
    """
    return getattr(rule, "_hard_stop", True)


def set_time_slice(rule: Any, seconds: float) -> None:
    """Let a MedianStoppingRule run a trial for so long before another may take its place.

    Needed for a rule that the user made; its `min_time_slice` is an argument of the constructor alone.
    """
    rule._min_time_slice = seconds


def rungs_of(asha: Any) -> list[list[dict[str, float]]]:
    """What an ASHAScheduler has recorded, trial -> metric, by bracket and rung: its own dicts, which may be updated.

    Needed to go on with a search; Ray Tune saves the trials and not what their scheduler has seen.
    """
    return [[recorded for _, recorded in bracket._rungs] for bracket in asha._brackets]


# --- packages of a job -----------------------------------------------------------------------------------------------


def walk_package(directory: Path, excludes: Sequence[str], visit: Callable[[Path], None]) -> None:
    """Call `visit` with each path that Ray would put into the package of a working directory.

    Needed to say what is too large before anything is sent; Ray itself says so after it has packed all, without sizes.
    """
    from ray._private.runtime_env import packaging

    rules = [packaging._get_excludes(directory, list(excludes))]
    packaging._dir_travel(directory, rules, visit, include_gitignore=True)


def write_package(directory: Path, excludes: Iterable[str], target: Path) -> None:
    """The package itself, as a zip file.

    Needed to know its size; `JobSubmissionClient` makes it only on the way to the cluster.
    """
    from ray._private.runtime_env import packaging

    packaging.create_package(str(directory), target, include_gitignore=True, excludes=list(excludes))
