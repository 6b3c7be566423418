"""The actor on the head node: it gathers the ranks' data, checks that it is complete, and writes it out.

It needs no accelerator, no JAX and no model: shards are numpy arrays, and an export is a file operation.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kithara_ray.checkpoint.disk_format import Checkpoint
from kithara_ray.checkpoint.run_files import write_manifest
from kithara_ray.errors import ExportError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import export_with_report
from kithara_ray.hf.exports.options import ExportOptions
from kithara_ray.hf.exports.trained import TensorSlice
from kithara_ray.hf.exports.trained_export import Receiver, export_trained
from kithara_ray.hf.model_files import write_files
from kithara_ray.orchestration.cluster.remote import head_node_id
from kithara_ray.orchestration.head import adapters
from kithara_ray.orchestration.head.adapters import AdapterExport, AdapterRef, Tensors
from kithara_ray.orchestration.head.export_tasks import prove_logits_here, write_on_cluster
from kithara_ray.orchestration.head.snapshot_writer import SnapshotWriter
from kithara_ray.orchestration.head.watchdog import Watch
from kithara_ray.orchestration.worker.channel import AdapterSpec, Event, SnapshotPart, WeightsSpec
from kithara_ray.orchestration.worker.heartbeat import BEAT_S, Beat, Limits
from kithara_ray.report import files as report
from kithara_ray.sharding.gather import Shard, assemble
from kithara_ray.storage.places import Place

logger = logging.getLogger(__name__)


# Calls that Ray repeats after a restart of the coordinator: the new one gives the same answers, and the caller waits.
_again: Any = ray.method(max_task_retries=10)
Method = TypeVar("Method", bound=Callable[..., Any])


def _asked_again(method: Method) -> Method:
    return _again(method)


class Coordinator:
    """The state of one model: progress of the run, the gathered adapter, exports."""

    def __init__(self):
        self._watcher: threading.Thread | None = None
        self._lock = threading.Lock()
        self._weights: Receiver | None = None
        self.start_run()

    @_asked_again
    def start_run(self) -> None:
        """Forget all data that an earlier run has sent."""
        self._events: list[Event] = []
        self._shards: dict[int, list[Shard]] = {}
        self._adapter: Tensors | None = None
        self._forget_weights()
        self._snapshots = SnapshotWriter()
        self._watch: Watch | None = None
        self._asked: str | None = None

    @_asked_again
    def ask(self, what: str) -> None:
        """Pass a request to all ranks, with the answers to their beats: "interrupt"."""
        self._asked = what

    def beat(self, beat: Beat, limits: Limits) -> str | None:
        """Record that a rank is alive, see `watchdog`; return the current request to the ranks."""
        with self._lock:
            if self._watch is None:
                self._watch = Watch(limits)
            self._watch.hear(beat, time.monotonic())
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._look, name="watchdog", daemon=True)
                self._watcher.start()
        return self._asked

    def stop_watching(self) -> None:
        """Stop the watchdog: the run has ended, in any way, and its ranks are silent from now on."""
        with self._lock:
            self._watch = None

    def _look(self) -> None:
        while True:
            time.sleep(BEAT_S)
            with self._lock:
                verdict = self._watch.verdict(time.monotonic()) if self._watch is not None else None
                condemned = self._watch.condemn() if self._watch is not None and verdict is not None else []
            if verdict is not None:
                logger.error("ending the worker group: %s", verdict)
                self.record({"kind": "stalled", "text": verdict})
            for node_id, pid in condemned:
                on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
                _kill.options(scheduling_strategy=on_node).remote(pid)

    @_asked_again
    def record(self, event: Event) -> None:
        """Record one event of rank 0, such as a logged step or a phase of start-up."""
        if event["kind"] == "begin":
            self._snapshots.forget()
        self._events.append(event)

    @_asked_again
    def events(self, start: int) -> list[Event]:
        """Return the events from number `start` on."""
        return self._events[start:]

    @_asked_again
    def put_shards(self, rank: int, shards: list[Shard]) -> None:
        """Take one rank's shards of the adapter."""
        self._shards[rank] = shards

    def put_snapshot(self, part: SnapshotPart) -> None:
        """Take one rank's shards of the adapter after a step; see `SnapshotWriter.put`."""
        event = self._snapshots.put(part)
        if event is not None:
            self._events.append(event)

    @_asked_again
    def adapter(self, spec: AdapterSpec, saved: str | None = None) -> Tensors:
        """Return the whole trained adapter, and keep it for exports. Check that its shards tile every tensor once.

        Args:
            saved: the run's last checkpoint, in case the coordinator was restarted after the shards were sent.

        Raises:
            AdapterError: a tensor is not tiled; the message names the tensor, the slice and the rank.
        """
        if self._adapter is None:
            if len(self._shards) < spec.num_ranks and saved is not None:
                root, _, directory = saved.rpartition("/")
                self._adapter = Checkpoint.open(Place(root), directory).adapter()
            else:
                shards = (shard for shards in self._shards.values() for shard in shards)
                self._adapter = assemble(spec.shapes, shards, spec.num_ranks)
            self._shards = {}
        return self._adapter

    def write_adapter(self, adapter: AdapterRef) -> str:
        """Write the adapter into the run's directory; return its path. Raises NotHeldError, DestinationError."""
        return adapters.write_adapter(adapter, adapters.tensors_of(adapter, self._adapter))

    def begin_weights(self, weights: WeightsSpec) -> int:
        """Prepare to receive trained weights; return the token that the ranks must send them with."""
        self._forget_weights()
        base = BaseCheckpoint.at(weights.base)
        self._weights = Receiver(base, weights.names, weights.dtype, weights.directory)
        return self._weights.token

    def put_slice(self, token: int, part: TensorSlice) -> None:
        """Take a slice of a trained weight."""
        if self._weights is None or self._weights.token != token:
            raise ExportError(f"rank {part.rank} sent {part.name} for an attempt that has ended")
        self._weights.put(part)

    def publish_weights(self, num_ranks: int) -> str:
        """Put the complete trained weights in their final place, and return it.

        Raises:
            ExportError: a tensor is missing; the message names it and the ranks that sent nothing.
        """
        if self._weights is None:
            raise ExportError("the coordinator was started again after the ranks had sent their weights; run once more")
        return self._weights.publish(num_ranks)

    def _forget_weights(self) -> None:
        if self._weights is not None:
            self._weights.abandon()
            self._weights = None

    def export_trained(
        self, base: str, weights: str, destination: str, options: ExportOptions, max_files: int | None = None
    ) -> str:
        """Write trained weights in the layout of the base's files; see `kithara_ray.hf.exports.trained_export`."""
        options = dataclasses.replace(options, write=functools.partial(write_on_cluster, max_files=max_files))
        return export_trained(BaseCheckpoint.at(base), BaseCheckpoint.at(weights), destination, options)

    def export(self, order: AdapterExport) -> str:
        """Write one of the three layouts, each weight file in its own task; see `kithara_ray.hf.exports.export`.

        If the base is on an object store or the Hub, this actor reads only its headers.

        Raises:
            NotHeldError: the coordinator lacks the adapter's tensors; the driver must send them.
        """
        base, config = order.adapter.base, order.adapter.config
        tensors = adapters.tensors_of(order.adapter, self._adapter)
        write = functools.partial(write_on_cluster, max_files=order.max_files)
        prove = functools.partial(prove_logits_here, base, config, tensors) if order.check_logits else None
        options = dataclasses.replace(order.options, write=write, prove=prove)
        opened, adapter = BaseCheckpoint.at(base), Adapter(config, tensors)
        export_with_report(opened, adapter, order.destination, order.layout, options)
        return order.destination

    def keep_files(self, files: Mapping[str, bytes], directories: Sequence[str]) -> str:
        """Write files into each directory, or into a temporary one if there are none; return the first directory.

        Raises:
            DestinationError: a directory cannot be written.
        """
        directories = directories or [tempfile.mkdtemp(prefix="kithara_ray_tokenizer_")]
        for directory in directories:
            write_files(directory, files)
        return directories[0]

    def write_run(self, directory: str, content: dict[str, Any]) -> None:
        """Write run.json of the run."""
        write_manifest(directory, content)

    def write_report(self, directory: str, history: dict[str, Any]) -> str:
        """Write history.json and report.html of the run beside its run.json; return the page's location."""
        return report.write(directory, history)

    def add_export(self, directory: str, destination: str) -> None:
        """Add an export to the report."""
        report.add_export(directory, destination)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    """End a worker's process on this node that no longer answers. Its id may belong to another process by now."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)


def start_coordinator() -> ActorHandle:
    """Start a coordinator on the head node. It holds no CPU, because it must also start on a full cluster."""
    head = head_node_id()
    # Ray restarts it if it dies: rank 0 and the checkpoints also hold all that it holds of a run.
    options = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "2"}}, "max_concurrency": 8}
    options["max_restarts"] = -1
    if head is not None:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(head, soft=False)
    made: Any = ray.remote(Coordinator).options(**options).remote()
    return made


def living_coordinator(known: ActorHandle | None) -> ActorHandle:
    """Return the known coordinator if it answers, else a new one: the cluster may have been restarted."""
    if known is not None:
        try:
            ray.get(known.__ray_ready__.remote(), timeout=30)
            return known
        except (RayError, ValueError):
            pass
    return start_coordinator()
