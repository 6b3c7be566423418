"""Adapters that the coordinator already holds, so that the driver need not send them again.

The driver names an adapter by a hash of its content. After a restart of the coordinator, or a change in the directory,
no adapter there matches the hash. The driver then sends the tensors.
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
from kithara_ray.hf.exports.options import ExportOptions
from kithara_ray.hf.exports.reference import split_reference
from kithara_ray.hf.identity import identity_of
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.resizing.saved import saved_tables
from kithara_ray.hf.safetensors_file import raw_bytes
from kithara_ray.orchestration.cluster.remote import remote_get
from kithara_ray.storage.places import Place
from kithara_ray.storage.urls import is_url

logger = logging.getLogger(__name__)

Tensors = dict[str, np.ndarray]
DIRECTORY = "adapter"


class NotHeldError(KitharaRayError):
    """The coordinator has no adapter with that content."""


@dataclass(frozen=True)
class AdapterRef:
    """An adapter identified by its content.

    Attributes:
        base, config: the adapted base, and the adapter's settings.
        digest: hash of its tensors, see `digest_of`.
        directory: the run's directory, where `adapter/` may hold it; None if there is none.
        tensors: the tensors themselves, if the coordinator does not have them.
    """

    base: str
    config: LoraConfig
    digest: str
    directory: str | None = None
    tensors: Tensors | None = None


@dataclass(frozen=True)
class AdapterExport:
    """The order for `Coordinator.export`; see also `kithara_ray.hf.exports.request.ExportRequest`.

    Attributes:
        options: the coordinator sets `write` and `prove` itself.
        max_files: number of weight files written at once; None means two per node.
    """

    adapter: AdapterRef
    destination: str
    layout: Layout
    options: ExportOptions
    max_files: int | None = None
    check_logits: bool = False


def digest_of(tensors: Mapping[str, np.ndarray]) -> str:
    """Return a hash of names, dtypes, shapes and bits; the order of the names does not matter."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(raw_bytes(array))
    return digest.hexdigest()


def ask(call: Callable[[AdapterRef], Any], adapter: AdapterRef, tensors: Tensors) -> Any:
    """Call the coordinator from the driver, and send the tensors only if the coordinator does not have them.

    Args:
        call: starts the remote call and returns its reference.
    """
    try:
        return remote_get(call(adapter))
    except NotHeldError:
        return remote_get(call(dataclasses.replace(adapter, tensors=tensors)))


def tensors_of(adapter: AdapterRef, held: Tensors | None) -> Tensors:
    """Return an adapter's tensors: those that were sent, else those in memory, else those in the run's directory.

    Args:
        held: the coordinator's tensors in memory, with any content.

    Raises:
        NotHeldError: none of them has that content.
    """
    if adapter.tensors is not None:
        return adapter.tensors
    if held is not None and digest_of(held) == adapter.digest:
        return held
    if adapter.directory is not None and not is_url(adapter.directory):
        # The files may be damaged in any way; the driver still has the tensors.
        with contextlib.suppress(KitharaRayError, OSError, ValueError):
            written = Adapter.read(Path(adapter.directory) / DIRECTORY).tensors
            if digest_of(written) == adapter.digest:
                return written
    raise NotHeldError("the coordinator does not hold this adapter; send its tensors")


def _named(handle: str) -> tuple[str, str | None, str | None]:
    """Return a base's name, revision and fingerprint. An adapter can be written even if its base is gone."""
    name, revision = split_reference(handle)
    try:
        base = BaseCheckpoint.at(handle)
        return name, identity_of(base, handle).revision, None if base.source else base.fingerprint()
    except (KitharaRayError, OSError) as error:
        logger.warning("%s cannot be read (%s); the adapter is written without its fingerprint", handle, error)
        return name, revision, None


def write_adapter(adapter: AdapterRef, tensors: Tensors) -> str:
    """Write the PEFT directory `adapter/` into the run's directory, file by file; return its path or URL.

    Raises:
        DestinationError: the directory cannot be written.
        CheckpointError: the base, which has the tables of a resized vocabulary, cannot be read.
    """
    assert adapter.directory is not None
    place = Place(adapter.directory)
    with place.scratch() as scratch:
        tables = saved_tables(adapter.config, BaseCheckpoint.at(adapter.base)) if adapter.config.is_resized else {}
        Adapter(adapter.config, tensors).write(scratch / DIRECTORY, *_named(adapter.base), tables)
        # The weights come first, because readers look for the configuration.
        for path in sorted((scratch / DIRECTORY).iterdir(), key=lambda path: path.suffix == ".json"):
            place.put(path, DIRECTORY, path.name)
    return place.url(DIRECTORY)
