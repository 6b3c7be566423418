"""Adapters written while training goes on: `export_every_steps`.

Each rank copies the slices that its devices hold and sends them to the coordinator; training does not wait for what
happens there. An export that fails is told and does not end the run: the weights are still on the devices.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from kithara_ray.errors import DestinationError
from kithara_ray.hf.publish import publish
from kithara_ray.orchestration.worker.channel import AdapterSpec, Channel, SnapshotPart, Wait
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
    """Sends one rank's part of each."""

    def __init__(self, settings: Snapshots, channel: Channel, rank: int, adapter: AdapterSpec):
        self._settings, self._channel, self._rank, self._adapter = settings, channel, rank, adapter
        self._sent: Wait | None = None

    def after(self, step: int, shards: Callable[[], list[Shard]]) -> None:
        """Send what this rank holds, if it is time to. One at a time: a slow destination slows training down rather
        than to fill the head's memory."""
        if step % self._settings.every == 0:
            self.wait()
            part = SnapshotPart(self._adapter, step, self._rank, shards(), self._settings.path(step))
            self._sent = self._channel.put_snapshot(part)

    def wait(self) -> None:
        """Until what was sent is written."""
        if self._sent is not None:
            self._sent()
            self._sent = None
