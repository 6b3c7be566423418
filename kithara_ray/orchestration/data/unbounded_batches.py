"""The global batches of an endless source, split over the devices of each host."""

import itertools

import jax
import numpy as np
import ray
from jax.sharding import NamedSharding

from kithara_ray.orchestration.data.placement import place
from kithara_ray.orchestration.data.prefetch import Prefetched
from kithara_ray.orchestration.data.tasks import causes
from kithara_ray.orchestration.data.unbounded import EndlessOrder, EndlessStore
from kithara_ray.sft.batches.collate import collate


class EndlessStream:
    """The global batches of an endless source. This process places only its own devices' parts; see HostStream."""

    def __init__(
        self,
        store: EndlessStore,
        order: EndlessOrder,
        shapes: tuple[tuple[int, int], ...],
        sharding: NamedSharding,
        packed: bool,
        ahead: int,
    ):
        self.store, self.order, self.shapes, self.sharding = store, order, shapes, sharding
        self._shape = shapes[-1] if packed else None
        self._ahead = ahead
        self._made: Prefetched | None = None
        self._next: int | None = None

    def batch(self, step: int) -> tuple[dict[str, jax.Array], int]:
        if self._made is None or self._next != step:
            self.close()
            self._made = Prefetched(self._make, itertools.count(step), self._ahead)
        self._next = step + 1
        return next(self._made)

    def source_rows(self, step: int) -> list[int]:
        """Return no rows: the source streams, so no row has a known number."""
        return []

    def close(self) -> None:
        """Stop making batches; none is requested after this."""
        if self._made is not None:
            self._made.close()

    def _make(self, step: int) -> tuple[dict[str, jax.Array], int]:
        with causes():
            batch = ray.get(self.store.reader.batch.remote(step, self.order, self._shape))
        tokens = [sum(len(row.token_ids) for row in pack) for pack in batch]
        shape = next(shape for shape in self.shapes if shape[0] >= max(tokens))

        def part(start: int, stop: int) -> dict[str, np.ndarray]:
            return collate(batch[start:stop], *shape, self.store.pad_id)

        return place(part, len(batch), shape, self.sharding), sum(tokens)
