"""Adapters written while training goes on: `export_every_steps`.

Each rank copies the slices that its devices hold and sends them to the coordinator; training does not wait for what
happens there. An export that fails is told and does not end the run: the weights are still on the devices.
"""

from collections.abc import Callable

from kithara_ray.orchestration.request.snapshots import Snapshots
from kithara_ray.orchestration.worker.channel import AdapterSpec, Channel, SnapshotPart, Wait
from kithara_ray.sharding.gather import Shard


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
