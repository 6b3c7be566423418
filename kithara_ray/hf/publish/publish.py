"""Publish exports to local directories, object stores that fsspec knows (gs://, s3://) and the Hub.

Readers find all of an export or none of it. A local directory (`local`) is a hidden sibling that is filled, fsynced and
renamed. An object store (`store`) cannot rename a directory, so a marker is put first, and the files from which loaders
start are put last. The Hub (`hub`) has commits.
"""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from kithara_ray.hf.publish import hub, local, store
from kithara_ray.hf.publish.stage import MARKER, PUBLISHED_LAST, Stage
from kithara_ray.storage.urls import is_url

__all__ = ["MARKER", "PUBLISHED_LAST", "Stage", "check_destination", "put_file", "staged"]


@contextlib.contextmanager
def staged(destination: str, plan: str = "", resume: bool = False) -> Generator[Stage]:
    """Yield a stage to write to; publish it at `destination` if the block ends without an exception.

    On an exception the destination stays as it was. plan: a digest of the exported content. resume: continue from the
    files that a killed or failed export of the same plan left there. If this one fails, keep the files.
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
    """Check that a directory can be published at `destination`, leaving nothing behind. Raises DestinationError.

    The destination must not exist, or be an empty directory. This creates and deletes something there, so that missing
    or expired credentials show now and not after the training.
    """
    destination = str(destination)
    if _is_local(destination):
        local.check(_local_path(destination))
    else:
        module = hub if destination.startswith("hf://") else store
        module.check(destination.rstrip("/"))


def put_file(local: Path, target: str, name: str) -> dict[str, Any]:
    """Upload one file as `name` at the URL `target` and check what arrived. Raises DestinationError.

    Returns the destination's receipt, plain data.
    """
    module = hub if target.startswith("hf://") else store
    return module.put_file(local, target, name)


def _is_local(destination: str) -> bool:
    return not is_url(destination) or destination.startswith("file://")


def _local_path(destination: str) -> Path:
    return Path(destination.removeprefix("file://")).expanduser().absolute()
