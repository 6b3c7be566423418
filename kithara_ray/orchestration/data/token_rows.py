"""Single rows of a tokenised dataset, read from its blocks in the object store."""

from collections import OrderedDict

import numpy as np

from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.sft.batches.blocks import TokenizedBlock, TokenizedRow


class Rows:
    """Rows of a store by their number. Blocks are read when needed, and the last used are kept.

    Blocks are mapped from the object store's own memory, and a mapped block cannot be spilled to disk. So the amount
    kept is bounded, and rows are copied out.
    """

    def __init__(self, store: TokenStore, kept_bytes: int | None = None):
        self.store, self.kept_bytes = store, store.kept_bytes() if kept_bytes is None else kept_bytes
        self._blocks: OrderedDict[int, tuple[TokenizedBlock, np.ndarray]] = OrderedDict()
        self._bytes = 0

    def source_row(self, row: int) -> int:
        """Return a row's position in the source."""
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
            block = self.store.block(number)
            self._blocks[number] = (block, np.cumsum(block.lengths))
            self._bytes += block.nbytes
            while self._bytes > self.kept_bytes and len(self._blocks) > 1:
                _, (oldest, _) = self._blocks.popitem(last=False)
                self._bytes -= oldest.nbytes
        self._blocks.move_to_end(number)
        return self._blocks[number]
