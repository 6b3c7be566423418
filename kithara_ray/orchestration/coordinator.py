"""The actor on the head node: gathers what the ranks send, checks that it is complete, writes it out.

It needs no accelerator, no JAX and no model: shards are numpy arrays, and an export is a file operation.
"""

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kithara_ray.errors import ExportError
from kithara_ray.hf import publish
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.card import split_reference
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.export import Layout, export
from kithara_ray.hf.trained import TensorSlice
from kithara_ray.hf.trained_export import Receiver, export_trained
from kithara_ray.orchestration.export_tasks import write_on_cluster
from kithara_ray.orchestration.remote import head_node_id
from kithara_ray.orchestration.snapshots import Snapshots, SnapshotWriter
from kithara_ray.sharding.gather import Shard, assemble

logger = logging.getLogger(__name__)


class Coordinator:
    """State of one model's life on the cluster: progress of the run, the gathered adapter, exports."""

    def __init__(self):
        self._events: list[dict[str, Any]] = []
        self._shards: dict[int, list[Shard]] = {}
        self._weights: Receiver | None = None
        self._snapshots = SnapshotWriter()

    def start_run(self) -> None:
        """Forget what an earlier attempt or run has sent."""
        self._events, self._shards = [], {}
        self._forget_weights()
        self._snapshots.forget()

    def record(self, event: dict[str, Any]) -> None:
        """One event of rank 0: a logged step, a phase of start-up."""
        if event["kind"] == "begin":
            self._snapshots.forget()
        self._events.append(event)

    def events(self, start: int) -> list[dict[str, Any]]:
        """The events from number `start` on."""
        return self._events[start:]

    def put_shards(self, rank: int, shards: list[Shard]) -> None:
        """What one rank held of the adapter."""
        self._shards[rank] = shards

    def check_snapshots(self, settings: Snapshots, may_resume: bool) -> None:
        """See `Snapshots.check`."""
        settings.check(may_resume)

    def put_snapshot(self, step: int, rank: int, shards: list[Shard], destination: str, **about: Any) -> None:
        """What one rank held of the adapter after a step; see `SnapshotWriter.put`."""
        event = self._snapshots.put(step, rank, shards, destination, **about)
        if event is not None:
            self._events.append(event)

    def adapter(self, shapes: dict[str, tuple[int, ...]], num_ranks: int) -> dict[str, np.ndarray]:
        """The whole adapter, its shards checked to tile every tensor exactly once.

        Raises:
            AdapterError: names the tensor, the slice and the rank.
        """
        return assemble(shapes, (shard for shards in self._shards.values() for shard in shards), num_ranks)

    def begin_weights(self, base: str, names: list[str], dtype: str, directory: str) -> int:
        """Make ready for trained weights, in a new directory below `directory`; what they are to be sent with."""
        self._forget_weights()
        self._weights = Receiver(BaseCheckpoint.at(base), names, dtype, directory)
        return self._weights.token

    def put_slice(self, token: int, part: TensorSlice) -> None:
        """A slice of one of them."""
        if self._weights is None or self._weights.token != token:
            raise ExportError(f"rank {part.rank} sent {part.name} of an attempt that is over")
        self._weights.put(part)

    def publish_weights(self, num_ranks: int) -> str:
        """Where the trained weights are, all of them, from here on.

        Raises:
            ExportError: names the tensor that is missing and the ranks that were not heard.
        """
        if self._weights is None:
            raise ExportError("the coordinator was started again after the ranks had sent their weights; run once more")
        return self._weights.publish(num_ranks)

    def _forget_weights(self) -> None:
        if self._weights is not None:
            self._weights.abandon()
            self._weights = None

    def export_trained(
        self, base: str, weights: str, destination: str, max_files: int | None = None, **options: Any
    ) -> str:
        """Write trained weights as the base's files are written; see `kithara_ray.hf.trained_export`."""
        opened = BaseCheckpoint.at(base), BaseCheckpoint.at(weights)
        write = functools.partial(write_on_cluster, max_files=max_files)
        return export_trained(*opened, destination, base_name=base, write=write, **options)

    def export(
        self,
        base: str,
        config: LoraConfig,
        tensors: dict[str, np.ndarray],
        destination: str,
        layout: Layout,
        max_files: int | None = None,
        **options: Any,
    ) -> str:
        """Write one of the three layouts, each weight file in a task of its own; see `kithara_ray.hf.export`.

        Of a base on an object store or the Hub, headers are all that is read here. max_files: at once.
        """
        checkpoint = BaseCheckpoint.at(base)
        return export(
            checkpoint,
            Adapter(config, tensors),
            destination,
            layout,
            base_name=base,
            write=functools.partial(write_on_cluster, max_files=max_files),
            **options,
        )

    def check_destination(self, destination: str) -> None:
        """See `kithara_ray.hf.publish`."""
        publish.check_destination(destination)

    def write_adapter(self, directory: str, config: LoraConfig, tensors: dict[str, np.ndarray], base: str) -> None:
        """The trained adapter into the run's directory."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        Adapter(config, tensors).write(path, *split_reference(base))


def start_coordinator() -> ray.actor.ActorHandle:
    """A coordinator on the head node, which holds no CPU: it must start beside a full cluster."""
    head = head_node_id()
    options = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "2"}}, "max_concurrency": 2}
    if head is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(head, soft=False)
    return ray.remote(Coordinator).options(**options).remote()
