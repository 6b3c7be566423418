"""The global batches of a tokenised dataset, split over the devices of each host.

    B  rows of the global batch    T  positions    K  predictions of a row

A worker fetches only the rows that its own devices hold.
"""

import itertools

import jax
import numpy as np
from jax.sharding import NamedSharding

from kithara_ray.orchestration.data.placement import place
from kithara_ray.orchestration.data.prefetch import Prefetched
from kithara_ray.orchestration.data.token_rows import Rows
from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.sft.batches.collate import collate
from kithara_ray.sft.batches.order import Order


class HostStream:
    """The global batches of a store. This process reads only the parts that its devices own.

    Args:
        store: the tokenised dataset.
        order: the assignment of rows to batches.
        shapes: (T, K) that batches may have, ascending. A batch takes the first shape that holds its rows.
        sharding: sharding of the batch; rows are split, positions are not.
        ahead: number of batches that a thread makes in advance, as long as steps are requested in order.
    """

    def __init__(
        self,
        store: TokenStore,
        order: Order,
        shapes: tuple[tuple[int, int], ...],
        sharding: NamedSharding,
        ahead: int = 0,
    ):
        self.store = store
        self.order = order
        self.sharding = sharding
        self.shapes = shapes
        self.ahead = ahead
        self._made: Prefetched | None = None
        self._next: int | None = None  # the step of the next batch in `_made`
        self._rows = Rows(store)

    def batch(self, step: int) -> tuple[dict[str, jax.Array], int]:
        """Return the arrays of one global batch, and its number of real tokens over all hosts."""
        if not self.ahead:
            return self._make(step)
        if self._made is None or self._next != step:
            self.close()
            self._made = Prefetched(self._make, itertools.count(step), self.ahead)
        self._next = step + 1
        return next(self._made)

    def source_rows(self, step: int) -> list[int]:
        """Return the source positions of the rows in a step's global batch."""
        return sorted(self._rows.source_row(int(row)) for row in np.concatenate(self.order.batch(step)))

    def close(self) -> None:
        """Stop making batches; none is requested after this."""
        if self._made is not None:
            self._made.close()

    def _make(self, step: int) -> tuple[dict[str, jax.Array], int]:
        packs = self.order.batch(step)
        tokens = [int(self.store.lengths[pack].sum()) for pack in packs]
        seq_len, predictions = self._shape(packs, tokens)

        def part(start: int, stop: int) -> dict[str, np.ndarray]:
            own = [[self._rows.row(int(row)) for row in pack] for pack in packs[start:stop]]
            return collate(own, seq_len, predictions, self.store.pad_id)

        return place(part, len(packs), (seq_len, predictions), self.sharding), sum(tokens)

    def _shape(self, packs: list[np.ndarray], tokens: list[int]) -> tuple[int, int]:
        """Choose the batch's shape. All hosts choose alike, because each knows the sizes of all rows of the batch."""
        trained = max(int(self.store.trained[pack].sum()) for pack in packs)
        return next(shape for shape in self.shapes if shape[0] >= max(tokens) and shape[1] >= trained)
