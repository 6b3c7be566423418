"""Adapters exported during training: `export_every_steps`.

Each rank copies the slices that its devices hold and sends them to the coordinator. Training does not wait for the
export. A failed export is reported and does not end the run: the weights are still on the devices.
"""

from collections.abc import Callable

from kithara_ray.orchestration.request.snapshots import Snapshots
from kithara_ray.orchestration.worker.channel import AdapterSpec, Channel, SnapshotPart, Wait
from kithara_ray.sharding.gather import Shard


class SnapshotSender:
    """Sends one rank's part of each exported adapter."""

    def __init__(self, settings: Snapshots, channel: Channel, rank: int, adapter: AdapterSpec):
        self._settings, self._channel, self._rank, self._adapter = settings, channel, rank, adapter
        self._sent: Wait | None = None

    def after(self, step: int, shards: Callable[[], list[Shard]]) -> None:
        """Send this rank's shards if an export is due. One export runs at a time: a slow destination slows training
        down instead of filling the head's memory."""
        if step % self._settings.every == 0:
            self.wait()
            part = SnapshotPart(self._adapter, step, self._rank, shards(), self._settings.path(step))
            self._sent = self._channel.put_snapshot(part)

    def wait(self) -> None:
        """Wait until the shards sent are written."""
        if self._sent is not None:
            self._sent()
            self._sent = None
