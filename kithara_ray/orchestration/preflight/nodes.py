"""The checks of the cluster's nodes: versions, accelerators, memory, room for the base."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kithara_ray.errors import ClusterError
from kithara_ray.orchestration.cluster import capacity, ray_compat
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.preflight.findings import Skipped, Warned, gb
from kithara_ray.orchestration.preflight.node_facts import NodeFacts, look_there, versions
from kithara_ray.orchestration.request.facts import mesh_axes, weight_bytes
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.storage import urls

_TASK_TIMEOUT_S = 60.0


class Nodes:
    """The living nodes of a cluster.

    Args:
        nodes: Ray's description of each node, by node id.
        look: returns the nodes' facts by node id. The first check that needs them calls it. Raises ClusterError for a
            node that does not answer, or cannot run this library.
        free: returns the free resources of each node, by node id.
    """

    def __init__(
        self,
        nodes: Mapping[str, Mapping[str, Any]],
        look: Callable[[], dict[str, NodeFacts]],
        free: Callable[[], Mapping[str, Mapping[str, float]]],
    ):
        self._nodes, self._look, self._free = nodes, look, free
        self._facts: dict[str, NodeFacts] | None = None

    @classmethod
    def of_cluster(cls) -> "Nodes":
        """Return the nodes of the connected cluster, after requesting the facts of all of them at once."""
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        asked = {
            node_id: look_there.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
            ).remote()
            for node_id in nodes
        }
        return cls(nodes, lambda: _answers(nodes, asked), ray_compat.free_by_node)

    def facts(self) -> dict[str, NodeFacts]:
        """Return the nodes' facts by node id."""
        if self._facts is None:
            self._facts = self._look()
        return self._facts

    def show(self) -> str:
        """List the nodes' resources."""
        resources = [capacity.show(node["Resources"]) for node in self._nodes.values()]
        return f"{len(resources)}: {'; '.join(resources)}"

    def check_versions(self) -> str:
        """Check that every node has the driver's versions."""
        facts = self.facts()
        here = versions()
        wrong = different_versions(here, {self._name(node_id): found.versions for node_id, found in facts.items()})
        if wrong:
            raise ClusterError(f"{'; '.join(wrong)}; install the same versions on all nodes")
        shown = ", ".join(f"{name} {here[name]}" for name in ("python", "ray", "jax", "keras-hub") if name in here)
        return f"{shown} on {len(facts)} node(s) and here"

    def check_tpus(self, request: RunRequest) -> str:
        """Check that there are chips, and that no process holds a chip that Ray counts as free."""
        if request.group.platform != "tpu":
            raise Skipped(f"the run asks for {request.group.platform}")
        free, chips = self._free(), 0
        for node_id, facts in self.facts().items():
            count = self._nodes[node_id]["Resources"].get("TPU", 0)
            if count:
                problem = tpu_problem(facts, count, free.get(node_id, {}).get("TPU", 0))
                if problem:
                    raise ClusterError(f"{self._name(node_id)}: {problem}")
                chips += len(facts.tpu_files)
        if not chips:
            raise ClusterError("no node has a TPU; start the run on a cluster of TPU hosts, or without use_tpu")
        return f"{chips} device file(s), unused on every host where Ray counts them as free"

    def ram_of_worker(self, group: WorkerGroup) -> int | None:
        """Return the least memory, in bytes, that a worker of a group may find on its host; None if none fits anywhere.

        A host's workers share its memory. As many are assumed as its resources have room for.
        """
        needs = ray_compat.resources_per_worker(group.scaling_config)
        found = []
        for node_id, facts in self.facts().items():
            there = capacity.placeable(group.num_workers, needs, [self._nodes[node_id]["Resources"]])
            found += [facts.ram_bytes // there] if there else []
        return min(found, default=None)

    def check_memory(self, request: RunRequest) -> str:
        """Check the host memory for the weights that workers on CPUs keep."""
        workers, total = request.group.num_workers, weight_bytes(request)
        if request.group.platform != "cpu":
            return f"{gb(total / workers)} of the base read by each host, kept on its accelerator"
        axes = mesh_axes(request)
        each = total * (axes["data"] if axes else 1) / workers
        rooms = sorted(((f.ram_bytes, f.ram_free_bytes, n) for n, f in self.facts().items()), reverse=True)
        on_node = math.ceil(workers / len(rooms))
        ram, free, node_id = rooms[min(workers, len(rooms)) - 1]
        need = f"{self._name(node_id)}: {on_node} worker(s) keep {gb(each)} of weights each"
        if each * on_node > ram:
            raise ClusterError(f"{need}, of {gb(ram)} of memory; use more hosts, or a smaller base")
        if each * on_node > free:
            raise Warned(f"{need}, and {gb(free)} of {gb(ram)} are free; end what uses the rest")
        return f"{gb(each)} of weights a worker, {gb(free)} free"

    def check_cache(self, request: RunRequest) -> str:
        """Check the room for a base that each host fetches; return "" if no host fetches one."""
        handle = request.model.preset_handle
        if not urls.is_url(handle) or handle.startswith(("hf://", "file://")):
            return ""
        total = weight_bytes(request)
        for node_id, facts in self.facts().items():
            if facts.cache_free_bytes < total:
                raise Warned(
                    f"{self._name(node_id)}: {gb(facts.cache_free_bytes)} free in the cache, the base has "
                    f"{gb(total)}; unless it is there already, free some space or set {urls.CACHE_VARIABLE}"
                )
        return f"{gb(total)} of base to each host's cache"

    def _name(self, node_id: str) -> str:
        return _name(self._nodes, node_id)


def _name(nodes: Mapping[str, Mapping[str, Any]], node_id: str) -> str:
    return f"node {nodes[node_id]['NodeManagerAddress']} ({node_id[:8]})"


def _answers(nodes: Mapping[str, Mapping[str, Any]], asked: Mapping[str, ray.ObjectRef]) -> dict[str, NodeFacts]:
    """Collect the nodes' facts. Raises ClusterError for a node that does not answer, or cannot run this library."""
    late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_TASK_TIMEOUT_S)[1]
    if late:
        slow = [_name(nodes, node_id) for node_id, reference in asked.items() if reference in late]
        raise ClusterError(
            f"{', '.join(slow)}: no answer within {_TASK_TIMEOUT_S:g} s; look at `ray status`, and restart Ray on the "
            "node"
        )
    found = {}
    for node_id, reference in asked.items():
        try:
            found[node_id] = ray.get(reference)
        except RayError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise ClusterError(
                f"{_name(nodes, node_id)}: kithara_ray cannot run there ({cause}); install the driver's version on "
                "every node"
            ) from error
    return found


def different_versions(here: Mapping[str, str], there: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Describe each difference between the versions here and those of the nodes, which are given by name."""

    def release(name: str, version: str) -> str:
        return ".".join(version.split(".")[:2]) if name == "python" else version

    return [
        f"{node} has {name} {found.get(name, 'none')}, the driver {here.get(name, 'none')}"
        for node, found in there.items()
        for name in sorted(here.keys() | found.keys())
        if release(name, here.get(name, "none")) != release(name, found.get(name, "none"))
    ]


def tpu_problem(facts: NodeFacts, count: float, free: float) -> str | None:
    """Return the problem of a node on which Ray counts `count` TPU chips, `free` of them free; None if it has none."""
    if not facts.tpu_files:
        return (
            f"Ray counts {count:g} TPU, and there is no /dev/accel* or /dev/vfio/*; start Ray on a TPU host, and give "
            "a container its devices (privileged)"
        )
    if facts.holders and free >= count:
        file, pid, name = facts.holders[0]
        return (
            f"{file} is held by process {pid} ({name}), which is not one of Ray's runs; end it on that host: kill {pid}"
        )
    return None
