"""The checks before a run, each with a name and one finding: for `kithara-ray doctor` and for every run's start.

They cover all that can be known before an accelerator is reserved, on all nodes in parallel, and take a second or two.
They start tasks and no actor, so a run that fails here leaves nothing on the cluster.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kithara_ray.errors import DestinationError, KitharaRayError
from kithara_ray.hf.exports.request import requests_of
from kithara_ray.orchestration.cluster import capacity, ray_compat
from kithara_ray.orchestration.preflight import memory_fit
from kithara_ray.orchestration.preflight.findings import OK, Finding, Skipped, Warned, find, gb
from kithara_ray.orchestration.preflight.mesh import with_mesh
from kithara_ray.orchestration.preflight.nodes import Nodes
from kithara_ray.orchestration.preflight.probes import FirstRows, Probes
from kithara_ray.orchestration.request.facts import mesh_axes, positions_of, weight_bytes
from kithara_ray.orchestration.request.run_request import RunRequest


def check_cluster() -> list[Finding]:
    """Check the cluster only, without a run."""
    nodes = Nodes.of_cluster()
    return [find("nodes", nodes.show), find("versions", nodes.check_versions)]


def check_run(
    request: RunRequest, exports: Sequence[Mapping[str, Any]], wait_s: float, tokenize: bool = False
) -> tuple[list[Finding], RunRequest]:
    """Run all checks of a run; return their findings, and the request with the mesh that it has by default.

    Args:
        exports: arguments of the `save_in_hf_format` calls that will follow.
        wait_s: seconds to wait until the cluster has the resources of the run, and has them free.
        tokenize: also load the tokenizer and tokenise the first rows. This takes seconds, which a run that tokenises
            next need not spend.

    Raises:
        ConfigError: an export is impossible for this model, whatever the training.
    """
    probes = Probes(request, requests_of(exports, request.model.lora))
    cluster = find("cluster", lambda: wait_for_cluster(request, wait_s))
    nodes = Nodes.of_cluster()  # after the wait, so nodes that joined meanwhile are included
    # Reading rows takes a free CPU; without one, Ray Data would wait forever.
    rows = FirstRows(request, tokenize) if cluster.state == OK else None
    with contextlib.suppress(KitharaRayError):  # a check reports the same error
        request = with_mesh(request, nodes)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", nodes.check_versions),
        ("accelerator", lambda: nodes.check_tpus(request)),
        ("devices", lambda: check_devices(request)),
        ("memory", lambda: nodes.check_memory(request)),
        ("disk", lambda: _check_disk(request, nodes, probes)),
        ("destinations", probes.check),
        ("length", lambda: check_length(request)),
        ("tokenizer, rows" if tokenize else "rows", lambda: _check_rows(rows)),
    ]
    return [cluster, *(find(name, check) for name, check in checks)], request


def wait_for_cluster(request: RunRequest, wait_s: float) -> str:
    """Wait until the cluster has the run's resources, and has them free; return their list. Raises ClusterError."""
    scaling = request.group.scaling_config
    needs, heads = ray_compat.resources_per_worker(scaling), capacity.slice_heads(scaling)
    capacity.wait_for_cluster(request.group.num_workers, needs, wait_s, heads)
    workers = f"{request.group.num_workers} worker(s) with {capacity.show(needs)} each"
    return f"{workers}" + (f", on {', '.join(f'{n:g} x {name}' for name, n in heads.items())}" if heads else "")


def check_devices(request: RunRequest) -> str:
    """Check that the mesh fits the devices, and that an "auto" batch can be found for them; return the global batch."""
    rows = request.train.per_device_batch_size
    if rows == "auto":
        memory_fit.check_auto(request)
    axes = mesh_axes(request)
    if axes is None:
        raise Skipped("the number of devices is known once the workers have started")
    devices = math.prod(axes.values())
    batch = f", global batch {rows * devices * request.step.micro_batches} rows" if rows != "auto" else ""
    shape = " ".join(f"{axis}={size}" for axis, size in axes.items())
    why = f"; {request.default_mesh['why']}" if request.default_mesh else ""
    return f"{devices} of {request.group.platform}: {shape}{batch}{why}"


def _check_disk(request: RunRequest, nodes: Nodes, probes: Probes) -> str:
    """Check for room for a base that each host fetches, and for exports of the base's size."""
    texts = []
    for destination, free in probes.free().items():
        total = weight_bytes(request)
        if free < total:
            raise DestinationError(
                f"{destination}: {gb(free)} are free there, but an export of base or merged weights takes "
                f"{gb(total)}; free some space or choose another destination"
            )
        texts.append(f"{gb(free)} free at {destination}")
    cache = nodes.check_cache(request)  # this check only warns, so it runs after those that fail
    return "; ".join(filter(None, [cache, *texts])) or "no export of the base's size is asked for"


def check_length(request: RunRequest) -> str:
    """Check that rows are no longer than the base was made for."""
    positions = positions_of(request)
    if positions is None:
        raise Skipped("the base's config.json does not say how long its sequences may be")
    longest = {name: loader.dataset.max_seq_len for name, loader in request.loaders()}
    if over := [f"{name}'s max_seq_len is {length}" for name, length in longest.items() if length > positions]:
        raise Warned(
            f"{' and '.join(over)}, and {request.model.preset_handle} supports {positions} positions "
            "(max_position_embeddings of its config.json); give a smaller max_seq_len, or a base for longer texts"
        )
    return f"max_seq_len {max(longest.values())} of {positions} positions"


def _check_rows(rows: FirstRows | None) -> str:
    if rows is None:
        raise Skipped("the cluster has no room for tasks that read them")
    return rows.check()
