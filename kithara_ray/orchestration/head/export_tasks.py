"""The weight files of an export as Ray tasks: one task per file, straight from the base to the destination.

A part with a URL at both ends runs on any node with a free CPU. A part that needs a directory of the head node runs
there. The caller sends each part's headers and factors and receives digests, so its memory does not grow with the
model.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kithara_ray.errors import ExportError, KitharaRayError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.part import Part, Written, write_part
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model import runtime
from kithara_ray.orchestration.cluster.remote import head_node_id, remote_get
from kithara_ray.orchestration.worker.entry import imported

logger = logging.getLogger(__name__)

FILES_PER_NODE = 2  # each takes a core, about 150 MB, and if a URL is involved, disk for up to two weight files
MAX_RETRIES = 3  # after the loss of a node; writing a file again writes the same bytes


def write_on_cluster(parts: Sequence[Part], max_files: int | None = None) -> Iterator[Written]:
    """Run the parts, a bounded number at a time, and yield each result as it is ready.

    If one part fails, or the caller stops, this cancels the tasks in flight and waits for their end. Nothing is written
    after that.

    Args:
        max_files: maximum tasks in flight; two per node by default.

    Raises:
        ExportError: a task was lost more often than it is retried; also the errors of `write_part`.
    """
    anywhere = all(part.runs_anywhere for part in parts)
    write = ray.remote(write_part).options(max_retries=MAX_RETRIES, **_placement(anywhere))
    limit = max(1, max_files or FILES_PER_NODE * (_cpu_nodes() if anywhere else 1))
    waiting, running = list(parts), {}
    logger.info("exporting files=%d at_once=%d nodes=%s", len(parts), limit, "any" if anywhere else "head")
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                part = waiting.pop(0)
                running[write.remote(part)] = part.name
            (done,), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(done)
            yield _result(done, name)
    finally:
        _cancel(list(running))


def prove_logits_here(base: str, config: LoraConfig, tensors: dict[str, np.ndarray], merged: Path) -> str:
    """Run `kithara_ray.model.proof` in a separate process on the head node, so that its memory is freed afterwards."""
    prove = ray.remote(max_calls=1)(_prove_logits).options(max_retries=0, **_placement(False))
    return remote_get(prove.remote(base, config, tensors, merged))


def _prove_logits(base: str, config: LoraConfig, tensors: dict[str, np.ndarray], merged: Path) -> str:
    os.environ["JAX_PLATFORMS"] = "cpu"
    runtime.prepare()
    prove_logits = imported("kithara_ray.model.proof:prove_logits")
    return prove_logits(BaseCheckpoint.open(base), config, tensors, merged)


def _result(done: ray.ObjectRef, name: str) -> Written:
    try:
        return remote_get(done)
    except KitharaRayError:
        raise
    except RayTaskError as error:
        raise ExportError(f"{name}: {type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        raise ExportError(
            f"{name}: its task was lost {MAX_RETRIES + 1} times ({type(error).__name__}); a node that runs out of "
            "memory or disk does this; start the export again with resume=True"
        ) from error


def _placement(anywhere: bool) -> dict:
    """Return the options of the tasks. The head node takes them even if it has no CPU to offer."""
    if anywhere:
        has_cpus = ray.cluster_resources().get("CPU", 0) >= 1
        return {"num_cpus": 1 if has_cpus else 0, "scheduling_strategy": "SPREAD"}
    head = head_node_id()
    here = NodeAffinitySchedulingStrategy(head or ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


def _cpu_nodes() -> int:
    return max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes()))


def _cancel(references: list[ray.ObjectRef]) -> None:
    """Cancel by force: a worker that copies gigabytes does not look for exceptions. Its temporary files are in /tmp."""
    for reference in references:
        ray.cancel(reference, force=True)
    if references:
        ray.wait(references, num_returns=len(references))
