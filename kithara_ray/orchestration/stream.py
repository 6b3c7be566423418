"""The global batches of a tokenised dataset, and of them what this host's devices own.

    B  rows of the global batch    T  positions    K  predictions of a row

A worker fetches only the rows that its own devices hold.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable

import jax
import numpy as np
import ray
from jax.sharding import NamedSharding

from kithara_ray.orchestration.prefetch import Prefetched
from kithara_ray.orchestration.token_store import TokenStore
from kithara_ray.sft.blocks import TokenizedBlock, TokenizedRow
from kithara_ray.sft.collate import collate
from kithara_ray.sft.order import Order

# Of blocks that a process keeps mapped, at most.
_KEPT_BYTES = 2**28


class HostStream:
    """The global batches of a store, of which this process reads what its devices own.

    Args:
        store: the tokenised dataset.
        order: which rows are in which batch.
        shapes: (T, K) that batches may have, ascending; a batch has the first that holds its rows.
        sharding: of the batch; rows are split, positions whole.
        ahead: batches that a thread makes before they are asked for, as long as steps are asked for in turn.
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
        self._next: int | None = None  # the step that comes next out of `_made`
        self._rows = Rows(store)

    def batch(self, step: int) -> tuple[dict[str, jax.Array], int]:
        """The arrays of one global batch, and how many real tokens it has over all hosts."""
        if not self.ahead:
            return self._make(step)
        if self._next != step:
            if self._made is not None:
                self._made.close()
            self._made = Prefetched(self._make, itertools.count(step), self.ahead)
        self._next = step + 1
        return next(self._made)

    def source_rows(self, step: int) -> list[int]:
        """The places in the source of the rows of a step's global batch."""
        return sorted(self._rows.source_row(int(row)) for row in np.concatenate(self.order.batch(step)))

    def close(self) -> None:
        """No more is asked for."""
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
        """The same on every host: it knows the sizes of all rows of the batch."""
        trained = max(int(self.store.trained[pack].sum()) for pack in packs)
        return next(shape for shape in self.shapes if shape[0] >= max(tokens) and shape[1] >= trained)


def place(
    part: Callable[[int, int], dict[str, np.ndarray]], rows: int, shape: tuple[int, int], sharding: NamedSharding
) -> dict[str, jax.Array]:
    """The global arrays of a batch of so many rows and of (T, K), of which `part(start, stop)` makes what is needed."""
    made: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def own(index: tuple[slice, ...], name: str) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        if (start, stop) not in made:
            made[start, stop] = part(start, stop)
        return made[start, stop][name]

    def array(name: str, width: int) -> jax.Array:
        return jax.make_array_from_callback((rows, width), sharding, lambda index: own(index, name))

    widths = dict.fromkeys(("token_ids", "segment_ids"), shape[0])
    widths |= dict.fromkeys(("target_positions", "target_ids", "target_weights"), shape[1])
    return {name: array(name, width) for name, width in widths.items()}


def _kept_bytes() -> int:
    """An eighth of this node's object store at most: several processes may share it."""
    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return min(_KEPT_BYTES, int(resources.get("object_store_memory", _KEPT_BYTES * 8)) // 8)


class Rows:
    """Rows of a store by their number, their blocks read when needed and the last used kept.

    Blocks are the object store's own memory, mapped. What is kept of them is bounded, and rows are copied out: a block
    that is mapped cannot leave the store for the disk.
    """

    def __init__(self, store: TokenStore, kept_bytes: int | None = None):
        self.store, self.kept_bytes = store, _kept_bytes() if kept_bytes is None else kept_bytes
        self._blocks: OrderedDict[int, tuple[TokenizedBlock, np.ndarray]] = OrderedDict()
        self._bytes = 0

    def source_row(self, row: int) -> int:
        """A row's place in the source."""
        number = int(np.searchsorted(self.store.starts, row, side="right")) - 1
        return int(self._block(number)[0].row_ids[row - int(self.store.starts[number])])

    def row(self, row: int) -> TokenizedRow:
        number = int(np.searchsorted(self.store.starts, row, side="right")) - 1
        block, ends = self._block(number)
        within = row - int(self.store.starts[number])
        stop = int(ends[within])
        start = stop - int(block.lengths[within])
        return TokenizedRow(block.token_ids[start:stop].copy(), block.loss_mask[start:stop].copy())

    def _block(self, number: int) -> tuple[TokenizedBlock, np.ndarray]:
        if number not in self._blocks:
            block = ray.get(self.store.blocks[number])
            self._blocks[number] = (block, np.cumsum(block.lengths))
            self._bytes += block.nbytes
            while self._bytes > self.kept_bytes and len(self._blocks) > 1:
                _, (oldest, _) = self._blocks.popitem(last=False)
                self._bytes -= oldest.nbytes
        self._blocks.move_to_end(number)
        return self._blocks[number]
