"""Adapters written while training goes on: `export_every_steps`.

Each rank copies the slices that its devices hold and sends them to the coordinator; training does not wait for what
happens there. An export that fails is told and does not end the run: the weights are still on the devices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ray

from kithara_ray.orchestration.request.snapshots import Snapshots
from kithara_ray.sharding.gather import Shard


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
