"""Adapters written while training goes on: `export_every_steps`.

Each rank copies the slices that its devices hold and sends them to the coordinator; training does not wait for what
happens there. An export that fails is told and does not end the run: the weights are still on the devices.
"""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from kithara_ray.errors import DestinationError
from kithara_ray.hf.publish import publish
from kithara_ray.sharding.gather import Shard
from kithara_ray.storage.places import Place
from kithara_ray.storage.urls import join


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
