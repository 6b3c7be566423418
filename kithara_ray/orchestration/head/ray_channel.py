"""A rank's channel to the coordinator, through Ray."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from kithara_ray.hf.exports.trained import TensorSlice
from kithara_ray.orchestration.cluster.process_setup import is_draining
from kithara_ray.orchestration.worker.channel import Event, SnapshotPart, Wait, WeightsSpec
from kithara_ray.orchestration.worker.heartbeat import Beat, Limits
from kithara_ray.sharding.gather import Shard

# Slices of a rank's trained weights in flight, each of `layout.SLICE_BYTES`; Ray's object store carries them.
_IN_FLIGHT = 2
_BEAT_TIMEOUT_S = 10


@dataclass(frozen=True)
class RayChannel:
    """A channel through Ray, see `worker.channel.Channel`. It goes to the workers as part of their RunSpec.

    Attributes:
        coordinator: the actor; Ray restarts it if it dies.
    """

    coordinator: ActorHandle

    @property
    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def record(self, event: Event, wait: bool = False) -> None:
        told = self.coordinator.record.remote(event)
        if wait:
            ray.get(told)

    def beat(self, beat: Beat, limits: Limits) -> str | None:
        asked: Any = ray.get(self.coordinator.beat.remote(beat, limits), timeout=_BEAT_TIMEOUT_S)
        return asked

    def is_draining(self) -> bool:
        return is_draining()

    def put_shards(self, rank: int, shards: Sequence[Shard]) -> None:
        ray.get(self.coordinator.put_shards.remote(rank, shards))

    def put_snapshot(self, part: SnapshotPart) -> Wait:
        return partial(ray.get, self.coordinator.put_snapshot.remote(part))

    def begin_weights(self, weights: WeightsSpec) -> int:
        token: Any = ray.get(self.coordinator.begin_weights.remote(weights))
        return token

    def put_slices(self, token: int, slices: Iterable[TensorSlice]) -> None:
        pending: list[ray.ObjectRef] = []
        for part in slices:
            if len(pending) == _IN_FLIGHT:
                done, pending = ray.wait(pending, num_returns=1)
                ray.get(done)
            pending.append(self.coordinator.put_slice.remote(token, part))
        ray.get(pending)
