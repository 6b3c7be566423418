"""The tasks with which a run begins. A process that Ray starts for one imports this module, so it imports little."""

import uuid
from collections.abc import Callable
from typing import Any

import ray

from kithara_ray.errors import DestinationError, KitharaRayError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.reference import split_reference
from kithara_ray.hf.identity import identity_of
from kithara_ray.hf.publish.publish import check_destination
from kithara_ray.orchestration.preflight.node_facts import free_disk
from kithara_ray.orchestration.request.snapshots import PREFIX
from kithara_ray.storage import urls
from kithara_ray.storage.places import Place

# The problem of a place to write to, or None, and the free bytes of a local one.
Found = tuple[KitharaRayError | None, int | None]


@ray.remote(num_cpus=0, max_retries=0)
def probe(path: str, check: Callable[[str], None]) -> Found:
    """Try one place from the node that this runs on. `check` raises DestinationError."""
    try:
        check(path)
    except KitharaRayError as error:
        return error, None
    return None, None if urls.is_url(path) else free_disk(path)


def probe_directory(path: str) -> None:
    """Raise DestinationError unless files can be written and deleted under `path`, which may exist or not."""
    check_destination(urls.join(path, f".kithara_ray_probe_{uuid.uuid4().hex[:8]}"))


def check_snapshots(directory: str, may_resume: bool) -> None:
    """Raise DestinationError unless adapters can be written there, and existing ones belong to this run."""
    probe_directory(directory)
    found = sorted(name for name in Place(directory).directories() if name.startswith(PREFIX))
    if found and not may_resume:
        raise DestinationError(
            f"{directory} holds {found[0]} from an earlier run; give another export_dir, or a checkpointer to "
            "continue that run"
        )


@ray.remote(num_cpus=0, max_retries=0)
def tokenize_first(tokenize: Any, rows: list[dict]) -> tuple[KitharaRayError | None, str]:
    """Check that the tokenizer loads, and that the first rows have the expected format."""
    try:
        block = tokenize(rows, 0)
    except KitharaRayError as error:
        return error, ""
    kept = ", ".join(str(int(length)) for length in block.lengths) or "none"
    return None, f"the first row(s) have {kept} tokens" + (f"; {block.samples[0]}" if block.samples else "")


@ray.remote(num_cpus=0, max_retries=0)
def base_facts(handle: str) -> dict[str, Any]:
    """Return the base's location and identity; if its weights are local, samples of them are hashed."""
    base = BaseCheckpoint.at(handle)
    name, revision = split_reference(handle)[0], identity_of(base, handle).revision
    fingerprint = None if base.source else base.fingerprint()
    return {"name": name, "revision": revision, "fingerprint": fingerprint, "model_type": base.config.get("model_type")}
