"""Adapters written while training goes on: `export_every_steps`.

Each rank copies the slices that its devices hold and sends them to the coordinator; training does not wait for what
happens there. An export that fails is told and does not end the run: the weights are still on the devices.
"""

import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from kithara_ray.errors import DestinationError, KitharaRayError
from kithara_ray.hf import publish
from kithara_ray.hf.adapter import ADAPTER_CONFIG, Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.export import Layout, export
from kithara_ray.hf.storage import join
from kithara_ray.sharding.gather import Shard, assemble
from kithara_ray.train.place import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshots:
    """Attributes: every: steps between two. directory: path or URL; `step-000100` in it is the adapter of step 100."""

    every: int
    directory: str

    def path(self, step: int) -> str:
        return join(self.directory, name_of(step))

    def check(self, may_resume: bool) -> None:
        """Before the run: it can be written, and what is there is of this run. Raises DestinationError."""
        publish.check_destination(join(self.directory, f".probe-{uuid.uuid4().hex[:8]}"))
        found = sorted(name for name in Place(self.directory).directories() if name.startswith("step-"))
        if found and not may_resume:
            raise DestinationError(
                f"{self.directory} holds {found[0]} of an earlier run; give another export_dir, or a checkpointer to "
                "go on with that run"
            )


def name_of(step: int) -> str:
    return f"step-{step:06d}"


class SnapshotSender:
    """One rank's part."""

    def __init__(self, settings: Snapshots, coordinator: ray.actor.ActorHandle, rank: int, about: Mapping[str, Any]):
        """about: num_ranks, shapes, config and base, as `SnapshotWriter.put` takes them."""
        self._settings, self._coordinator, self._rank, self._about = settings, coordinator, rank, about
        self._sent: ray.ObjectRef | None = None

    def after(self, step: int, shards: Callable[[], list[Shard]]) -> None:
        """Send what this rank holds, if it is time to. One at a time: a slow destination slows training down rather
        than to fill the head's memory."""
        if step % self._settings.every == 0:
            self.wait()
            put = self._coordinator.put_snapshot.remote
            self._sent = put(step, self._rank, shards(), self._settings.path(step), **self._about)

    def wait(self) -> None:
        """Until what was sent is written."""
        if self._sent is not None:
            ray.get(self._sent)
            self._sent = None


class SnapshotWriter:
    """The coordinator's part: puts the ranks' slices together and writes them. Calls may come from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._shards: dict[int, dict[int, list[Shard]]] = {}

    def forget(self) -> None:
        """What an earlier attempt has sent."""
        with self._lock:
            self._shards = {}

    def put(
        self,
        step: int,
        rank: int,
        shards: list[Shard],
        destination: str,
        num_ranks: int,
        shapes: Mapping[str, tuple[int, ...]],
        config: LoraConfig,
        base: str,
    ) -> dict[str, Any] | None:
        """One rank's slices. The last of a step has it written, and is told how that went: an event."""
        with self._lock:
            ranks = self._shards.setdefault(step, {})
            ranks[rank] = shards
            if len(ranks) < num_ranks:
                return None
            del self._shards[step]
        event = {"kind": "export", "step": step, "path": destination, "error": None}
        try:
            if ADAPTER_CONFIG in Place(destination).files(""):
                return event  # of this run, before it was resumed
            tensors = assemble(dict(shapes), [shard for held in ranks.values() for shard in held], num_ranks)
            opened = BaseCheckpoint.at(base)
            export(opened, Adapter(config, tensors), destination, Layout.ADAPTER, base_name=base, run={"step": step})
        except (KitharaRayError, OSError) as error:
            logger.warning("the adapter of step %d was not written: %s", step, error)
            event["error"] = str(error)
        return event
