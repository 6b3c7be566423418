"""The coordinator's part in exporting adapters during training; `worker.snapshots` has the ranks' part."""

import logging
import threading
from typing import Any

from kithara_ray.checkpoint.run_files import tokenizer_of
from kithara_ray.errors import KitharaRayError
from kithara_ray.hf.adapter import ADAPTER_CONFIG, Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout, export
from kithara_ray.orchestration.worker.channel import SnapshotPart
from kithara_ray.sharding.gather import Shard, assemble
from kithara_ray.storage.places import Place

logger = logging.getLogger(__name__)


class SnapshotWriter:
    """Joins the ranks' slices and writes them. Several threads may call it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._parts: dict[int, dict[int, SnapshotPart]] = {}

    def forget(self) -> None:
        """Forget the parts that an earlier attempt has sent."""
        with self._lock:
            self._parts = {}

    def put(self, part: SnapshotPart) -> dict[str, Any] | None:
        """Keep one rank's part. The last part of a step causes the adapter to be written. Return an event with the
        outcome, or None before the last part."""
        with self._lock:
            ranks = self._parts.setdefault(part.step, {})
            ranks[part.rank] = part
            if len(ranks) < part.adapter.num_ranks:
                return None
            del self._parts[part.step]
        event = {"kind": "export", "step": part.step, "path": part.destination, "error": None}
        try:
            if ADAPTER_CONFIG not in Place(part.destination).files(""):  # else this run wrote it before it resumed
                _write(part, [shard for sent in ranks.values() for shard in sent.shards])
        except (KitharaRayError, OSError) as error:
            logger.warning("the adapter of step %d was not written: %s", part.step, error)
            event["error"] = str(error)
        return event


def _write(part: SnapshotPart, shards: list[Shard]) -> None:
    """Write all ranks' shards as one adapter; the settings are the same in each part."""
    adapter = part.adapter
    tensors = assemble(adapter.shapes, shards, adapter.num_ranks)
    export(
        BaseCheckpoint.at(adapter.base),
        Adapter(adapter.config, tensors),
        part.destination,
        Layout.ADAPTER,
        base_name=adapter.base,
        run={"step": part.step},
        tokenizer=tokenizer_of(part.destination),
    )
