"""The checks before a run, each with a name and one finding: for `kithara-ray doctor` and for every run's start.

They look at what can be known before an accelerator is reserved, at all nodes side by side, and take a second or two.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kithara_ray.errors import ClusterError, DestinationError, KitharaRayError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.request import requests_of
from kithara_ray.hf.positions import max_positions
from kithara_ray.orchestration.cluster import capacity, ray_compat
from kithara_ray.orchestration.preflight.node_facts import NodeFacts, look_there, versions
from kithara_ray.orchestration.preflight.probes import FirstRows, Probes
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.storage import urls

logger = logging.getLogger(__name__)

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
_TASK_TIMEOUT_S = 60.0
# A chip of these is one JAX device.
_ONE_DEVICE_A_CHIP = ("TPU-V4", "TPU-V5P", "TPU-V5LITEPOD", "TPU-V6E")


@dataclass(frozen=True)
class Finding:
    """Attributes:
    name: of the check.
    state: "ok", "warning", "failed" or "skipped".
    text: what was found; of what is not ok, with what to do.
    error: of a failed check.
    """

    name: str
    state: str
    text: str
    error: KitharaRayError | None = None


class Warned(Exception):
    """Raised by a check that lets the run go on."""


class Skipped(Exception):
    """Raised by a check that does not apply."""


def raise_for(findings: Sequence[Finding]) -> None:
    """Raise what failed: an error of the first one's class, with all messages."""
    failed = [finding for finding in findings if finding.state == FAILED]
    if failed:
        raise type(failed[0].error)("\n".join(finding.text for finding in failed))


def check_cluster() -> list[Finding]:
    """Of the cluster alone, without a run."""
    nodes = _Nodes()
    return [_find("nodes", nodes.show), _find("versions", nodes.check_versions)]


def check_run(
    trainer: Any, exports: Sequence[Mapping[str, Any]], wait_s: float, tokenize: bool = False
) -> list[Finding]:
    """All checks of a run.

    Args:
        trainer: a Trainer.
        exports: arguments of the `save_in_hf_format` calls that will follow.
        wait_s: how long the cluster may take to have, and to have free, what the run asks for.
        tokenize: load the tokenizer and tokenise the first rows too: seconds, which a run that tokenises next need not
            spend.

    Raises:
        ConfigError: an export that could not be made of this model, whatever was trained.
    """
    probes = Probes(trainer, requests_of(exports, trainer.model.lora))
    cluster = _find("cluster", lambda: wait_for_cluster(trainer, wait_s))
    nodes = _Nodes()  # those that came meanwhile too
    # Reading rows takes a free CPU, for which Ray Data would wait without end.
    rows = FirstRows(trainer, tokenize) if cluster.state == OK else None
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", nodes.check_versions),
        ("accelerator", lambda: nodes.check_tpus(trainer)),
        ("devices", lambda: _check_devices(trainer)),
        ("memory", lambda: nodes.check_memory(trainer)),
        ("disk", lambda: nodes.check_disk(trainer, probes)),
        ("destinations", probes.check),
        ("length", lambda: _check_length(trainer)),
        ("tokenizer, rows" if tokenize else "rows", lambda: _check_rows(rows)),
    ]
    return [cluster, *(_find(name, check) for name, check in checks)]


def _find(name: str, check: Callable[[], str]) -> Finding:
    started = time.monotonic()
    try:
        return Finding(name, OK, check())
    except Warned as warned:
        logger.warning("%s: %s", name, warned)
        return Finding(name, WARNING, str(warned))
    except Skipped as skipped:
        return Finding(name, SKIPPED, str(skipped))
    except KitharaRayError as error:
        return Finding(name, FAILED, str(error), error)
    finally:
        logger.debug("check %s: seconds=%.2f", name, time.monotonic() - started)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"


# --------------------------------------------------------------------------------------------------------- cluster


def wait_for_cluster(trainer: Any, wait_s: float) -> str:
    """Wait until the cluster has, and has free, what the run asks for; returns what that is. Raises ClusterError."""
    scaling = trainer.scaling_config
    needs, heads = ray_compat.resources_per_worker(scaling), capacity.slice_heads(scaling)
    capacity.wait_for_cluster(scaling.num_workers, needs, wait_s, heads)
    workers = f"{scaling.num_workers} worker(s) with {capacity.show(needs)} each"
    return f"{workers}" + (f", on {', '.join(f'{n:g} x {name}' for name, n in heads.items())}" if heads else "")


class _Nodes:
    """Facts of all living nodes, asked for at once and awaited by the first check that needs them."""

    def __init__(self):
        self._nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        self._asked = {
            node_id: look_there.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
            ).remote()
            for node_id in self._nodes
        }
        self._facts: dict[str, NodeFacts] | None = None

    def facts(self) -> dict[str, NodeFacts]:
        """By node id. Raises ClusterError for a node that does not answer, or cannot."""
        if self._facts is None:
            late = ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=_TASK_TIMEOUT_S)[1]
            if late:
                slow = [self._name(node_id) for node_id, asked in self._asked.items() if asked in late]
                raise ClusterError(
                    f"{', '.join(slow)}: no answer within {_TASK_TIMEOUT_S:g} s; look at `ray status`, and restart Ray "
                    "on the node"
                )
            self._facts = {node_id: self._fact(node_id, asked) for node_id, asked in self._asked.items()}
        return self._facts

    def _fact(self, node_id: str, asked: ray.ObjectRef) -> NodeFacts:
        try:
            return ray.get(asked)
        except ray.exceptions.RayError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise ClusterError(
                f"{self._name(node_id)}: kithara_ray cannot be run there ({cause}); install the driver's version on "
                "every node"
            ) from error

    def _name(self, node_id: str) -> str:
        return f"node {self._nodes[node_id]['NodeManagerAddress']} ({node_id[:8]})"

    def show(self) -> str:
        resources = [capacity.show(node["Resources"]) for node in self._nodes.values()]
        return f"{len(resources)}: {'; '.join(resources)}"

    def check_versions(self) -> str:
        """Every node has what the driver has."""
        here = versions()
        facts = {self._name(node_id): facts for node_id, facts in self.facts().items()}
        wrong = different_versions(here, {name: found.versions for name, found in facts.items()})
        if wrong:
            raise ClusterError(f"{'; '.join(wrong)}; install the same versions on all nodes")
        shown = ", ".join(f"{name} {here[name]}" for name in ("python", "ray", "jax", "keras-hub") if name in here)
        return f"{shown} on {len(facts)} node(s) and here"

    def check_tpus(self, trainer: Any) -> str:
        """Chips are there, and no process holds one that Ray has free."""
        if trainer.group.platform != "tpu":
            raise Skipped(f"the run asks for {trainer.group.platform}")
        free = ray_compat.free_by_node()
        chips = 0
        for node_id, facts in self.facts().items():
            count = self._nodes[node_id]["Resources"].get("TPU", 0)
            if count:
                problem = tpu_problem(facts, count, free.get(node_id, {}).get("TPU", 0))
                if problem:
                    raise ClusterError(f"{self._name(node_id)}: {problem}")
                chips += len(facts.tpu_files)
        if not chips:
            raise ClusterError("no node has a TPU; start the run on a cluster of TPU hosts, or without use_tpu")
        return f"{chips} device file(s), held by nobody where Ray has them free"

    def check_memory(self, trainer: Any) -> str:
        """Host memory for the weights that workers on CPUs keep."""
        workers, total = trainer.scaling_config.num_workers, _weight_bytes(trainer)
        if trainer.group.platform != "cpu":
            return f"{_gb(total / workers)} of the base read by each host, kept on its accelerator"
        axes = mesh_axes(trainer)
        each = total * (axes["data"] if axes else 1) / workers
        rooms = sorted(((f.ram_bytes, f.ram_free_bytes, n) for n, f in self.facts().items()), reverse=True)
        on_node = math.ceil(workers / len(rooms))
        ram, free, node_id = rooms[min(workers, len(rooms)) - 1]
        need = f"{self._name(node_id)}: {on_node} worker(s) keep {_gb(each)} of weights each"
        if each * on_node > ram:
            raise ClusterError(f"{need}, of {_gb(ram)} of memory; use more hosts, or a smaller base")
        if each * on_node > free:
            raise Warned(f"{need}, and {_gb(free)} of {_gb(ram)} are free; end what uses the rest")
        return f"{_gb(each)} of weights a worker, {_gb(free)} free"

    def check_disk(self, trainer: Any, probes: Probes) -> str:
        """Room for a base that is fetched to each host, and for exports of the base's size."""
        total = _weight_bytes(trainer)
        texts = []
        handle = trainer.model.preset_handle
        if urls.is_url(handle) and not handle.startswith(("hf://", "file://")):
            for node_id, facts in self.facts().items():
                if facts.cache_free_bytes < total:
                    raise Warned(
                        f"{self._name(node_id)}: {_gb(facts.cache_free_bytes)} free in the cache, the base has "
                        f"{_gb(total)}; unless it is there already, free room or set {urls.CACHE_VARIABLE}"
                    )
            texts.append(f"{_gb(total)} of base to each host's cache")
        for destination, free in probes.free().items():
            if free < total:
                raise DestinationError(
                    f"{destination}: {_gb(free)} are free there, an export of base or merged weights has {_gb(total)}; "
                    "free room or choose another destination"
                )
            texts.append(f"{_gb(free)} free at {destination}")
        return "; ".join(texts) or "nothing of the base's size is written"


def different_versions(here: Mapping[str, str], there: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What differs, a text each, between the versions here and those of nodes by name."""

    def release(name: str, version: str) -> str:
        return ".".join(version.split(".")[:2]) if name == "python" else version

    return [
        f"{node} has {name} {found.get(name, 'none')}, the driver {here.get(name, 'none')}"
        for node, found in there.items()
        for name in sorted(here.keys() | found.keys())
        if release(name, here.get(name, "none")) != release(name, found.get(name, "none"))
    ]


def tpu_problem(facts: NodeFacts, count: float, free: float) -> str | None:
    """What is wrong on a node where Ray counts `count` TPU chips, `free` of them free."""
    if not facts.tpu_files:
        return (
            f"Ray counts {count:g} TPU, and there is no /dev/accel* or /dev/vfio/*; start Ray on a TPU host, and give "
            "a container its devices (privileged)"
        )
    if facts.holders and free >= count:
        file, pid, name = facts.holders[0]
        return f"{file} is held by process {pid} ({name}), which is none of Ray's runs; end it on that host: kill {pid}"
    return None


def _weight_bytes(trainer: Any) -> int:
    base = BaseCheckpoint.at(trainer.model.preset_handle)
    return sum(info.nbytes for info in base.tensors.values())


# --------------------------------------------------------------------------------------------------------- devices


def count_devices(trainer: Any) -> int | None:
    """How many JAX devices the run will have; None where only the accelerator knows."""
    scaling, env = trainer.scaling_config, trainer.group.env()
    if env["JAX_PLATFORMS"].split(",")[0] == "cpu":
        found = re.search(r"--xla_force_host_platform_device_count=(\d+)", env.get("XLA_FLAGS", ""))
        return scaling.num_workers * int(found.group(1) if found else 1)
    if scaling.use_tpu and scaling.accelerator_type in _ONE_DEVICE_A_CHIP:
        return int(scaling.num_workers * ray_compat.resources_per_worker(scaling).get("TPU", 0)) or None
    return None


def mesh_axes(trainer: Any) -> dict[str, int] | None:
    """The sizes of the mesh's axes, as the workers will lay it out; None where the devices are not known.

    Raises:
        ConfigError: the mesh does not fit the devices.
    """
    devices = count_devices(trainer)
    if devices is None:
        return None
    slices = sum(capacity.slice_heads(trainer.scaling_config).values()) if trainer.group.platform == "tpu" else 0
    shape = trainer.mesh or MeshShape(data=int(slices) or 1)
    return dict(zip(("data", "fsdp", "tensor"), shape.resolve(devices), strict=True))


def _check_devices(trainer: Any) -> str:
    """The mesh fits the devices; what the global batch is."""
    axes = mesh_axes(trainer)
    if axes is None:
        raise Skipped("how many devices there are shows when the workers have started")
    devices, rows = math.prod(axes.values()), trainer.train_dataloader.per_device_batch_size
    batch = f", global batch {rows * devices * trainer.gradient_accumulation_steps} rows" if rows != "auto" else ""
    return f"{devices} of {trainer.group.platform}: {' '.join(f'{axis}={size}' for axis, size in axes.items())}{batch}"


def _check_length(trainer: Any) -> str:
    """Rows are no longer than what the base was made for."""
    positions = max_positions(BaseCheckpoint.at(trainer.model.preset_handle).config)
    if positions is None:
        raise Skipped("the base's config.json does not say for how long a sequence it was made")
    loaders = {name: getattr(trainer, name) for name in ("train_dataloader", "eval_dataloader")}
    longest = {name: loader.dataset.max_seq_len for name, loader in loaders.items() if loader is not None}
    if over := [f"{name}'s max_seq_len is {length}" for name, length in longest.items() if length > positions]:
        raise Warned(
            f"{' and '.join(over)}, and {trainer.model.preset_handle} was made for {positions} positions "
            "(max_position_embeddings of its config.json); give a smaller max_seq_len, or a base for longer texts"
        )
    return f"max_seq_len {max(longest.values())} of {positions} positions"


def _check_rows(rows: FirstRows | None) -> str:
    if rows is None:
        raise Skipped("the cluster has no room to read them")
    return rows.check()
