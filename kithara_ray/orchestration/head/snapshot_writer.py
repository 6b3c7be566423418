"""The coordinator's part of adapters written while training goes on; `worker.snapshots` has the ranks' part."""

import logging
import threading
from collections.abc import Mapping
from typing import Any

from kithara_ray.errors import KitharaRayError
from kithara_ray.hf.adapter import ADAPTER_CONFIG, Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout, export
from kithara_ray.sharding.gather import Shard, assemble
from kithara_ray.storage.places import Place

logger = logging.getLogger(__name__)


class SnapshotWriter:
    """Puts the ranks' slices together and writes them. Calls may come from several threads."""

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
