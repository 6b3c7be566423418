"""Where exports go: local directories, object stores that fsspec knows (gs://, s3://), the Hub. Readers find all of an
export or none of it.

Local: a hidden sibling is filled, fsynced and renamed (`local`). Object stores have no rename of a directory:
a marker is put first, what loaders start from last (`store`). The Hub has commits (`hub`).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kithara_ray.hf.publish import hub, local, store
from kithara_ray.hf.publish.stage import MARKER, PUBLISHED_LAST, Stage
from kithara_ray.storage.urls import is_url

__all__ = ["MARKER", "PUBLISHED_LAST", "Stage", "check_destination", "put_file", "staged"]


@contextlib.contextmanager
def staged(destination: str, plan: str = "", resume: bool = False) -> Iterator[Stage]:
    """Yields where to write; publishes it at `destination` when the block ends without exception.

    On an exception the destination is as it was. plan: what is exported, as a digest. resume: go on from what a
    killed or failed export of the same plan left there, and leave what there is if this one fails.
    Raises DestinationError.
    """
    destination = str(destination)
    if _is_local(destination):
        publisher = local.staged(_local_path(destination), plan, resume)
    else:
        module = hub if destination.startswith("hf://") else store
        publisher = module.staged(destination.rstrip("/"), plan, resume)
    with publisher as stage:
        yield stage


def check_destination(destination: str) -> None:
    """Raises DestinationError unless a directory can be published at `destination`. Leaves nothing behind.

    It must not exist, or be an empty directory; writing is probed by creating and deleting: credentials that are
    missing or expired show here and not after the training.
    """
    destination = str(destination)
    if _is_local(destination):
        local.check(_local_path(destination))
    else:
        module = hub if destination.startswith("hf://") else store
        module.check(destination.rstrip("/"))


def put_file(local: Path, target: str, name: str) -> dict[str, Any]:
    """Upload one file as `name` at the URL `target` and check what arrived; returns the destination's receipt, plain
    data. Raises DestinationError."""
    module = hub if target.startswith("hf://") else store
    return module.put_file(local, target, name)


def _is_local(destination: str) -> bool:
    return not is_url(destination) or destination.startswith("file://")


def _local_path(destination: str) -> Path:
    return Path(destination.removeprefix("file://")).expanduser().absolute()
