"""Adapters that the coordinator already has, so that they are not sent to it again.

The driver names an adapter by its content. A coordinator that was started again, or a directory that was changed
since, holds nothing of that name: the driver then sends the tensors.
"""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kithara_ray.errors import KitharaRayError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout
from kithara_ray.hf.exports.reference import split_reference
from kithara_ray.hf.identity import identity_of
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.storage.places import Place
from kithara_ray.storage.urls import is_url

logger = logging.getLogger(__name__)

Tensors = dict[str, np.ndarray]
DIRECTORY = "adapter"


class NotHeldError(KitharaRayError):
    """The coordinator has no adapter of that content."""


@dataclass(frozen=True)
class AdapterRef:
    """An adapter by its content.

    Attributes:
        base, config: what it adapts, and how.
        digest: of its tensors, as of `digest_of`.
        directory: the run's directory, where `adapter/` may hold it; None if there is none.
        tensors: the tensors themselves, where the coordinator does not have them.
    """

    base: str
    config: LoraConfig
    digest: str
    directory: str | None = None
    tensors: Tensors | None = None


@dataclass(frozen=True)
class AdapterExport:
    """What `Coordinator.export` writes; the fields are those of `kithara_ray.hf.exports.request.ExportRequest`.

    Attributes:
        max_files: weight files that are written at once; None: two a node.
        options: of `kithara_ray.hf.exports.export.export`.
    """

    adapter: AdapterRef
    destination: str
    layout: Layout
    max_files: int | None = None
    check_logits: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def digest_of(tensors: Mapping[str, np.ndarray]) -> str:
    """A hash of names, dtypes, shapes and bits; the order of the names does not count."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def ask(call: Callable[[AdapterRef], Any], adapter: AdapterRef, tensors: Tensors) -> Any:
    """On the driver: the result of a remote call, with the tensors sent only if the coordinator does not have them.

    Args:
        call: starts it and returns its reference.
    """
    try:
        return remote_get(call(adapter))
    except NotHeldError:
        return remote_get(call(dataclasses.replace(adapter, tensors=tensors)))


def tensors_of(adapter: AdapterRef, held: Tensors | None) -> Tensors:
    """The tensors of an adapter: those that were sent, else those in memory, else those in the run's directory.

    Args:
        held: what the coordinator has in memory, of whatever content.

    Raises:
        NotHeldError: none of them are of that content.
    """
    if adapter.tensors is not None:
        return adapter.tensors
    if held is not None and digest_of(held) == adapter.digest:
        return held
    if adapter.directory is not None and not is_url(adapter.directory):
        # Whatever is wrong with the files, the driver still has the tensors.
        with contextlib.suppress(KitharaRayError, OSError, ValueError):
            written = Adapter.read(Path(adapter.directory) / DIRECTORY).tensors
            if digest_of(written) == adapter.digest:
                return written
    raise NotHeldError("the coordinator does not hold this adapter; send its tensors")


def _named(handle: str) -> tuple[str, str | None, str | None]:
    """Name, revision and fingerprint of a base. A trained adapter is written even where its base is gone."""
    name, revision = split_reference(handle)
    try:
        base = BaseCheckpoint.at(handle)
        return name, identity_of(base, handle).revision, None if base.source else base.fingerprint()
    except (KitharaRayError, OSError) as error:
        logger.warning("%s cannot be read (%s); the adapter is written without its fingerprint", handle, error)
        return name, revision, None


def write_adapter(adapter: AdapterRef, tensors: Tensors) -> str:
    """The PEFT directory `adapter/` in the run's directory, file by file; returns its path or URL.

    Raises:
        DestinationError: it cannot be written.
    """
    place = Place(adapter.directory)
    with place.scratch() as scratch:
        Adapter(adapter.config, tensors).write(scratch / DIRECTORY, *_named(adapter.base))
        # The weights first: readers look for the configuration.
        for path in sorted((scratch / DIRECTORY).iterdir(), key=lambda path: path.suffix == ".json"):
            place.put(path, DIRECTORY, path.name)
    return place.url(DIRECTORY)
