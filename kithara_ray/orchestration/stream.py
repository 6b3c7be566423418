"""Ray Data to the global batch sequence, and of that to what this host's devices own.

    B  rows of the global batch    T  positions    K  predictions of a row

The driver streams the source's blocks through tokenising tasks and keeps references to the tokenised blocks; they stay
in the object store, which spills to disk by itself. A worker fetches only the rows that its own devices hold.
"""

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
import ray
from jax.sharding import NamedSharding

from kithara_ray.errors import DataError
from kithara_ray.orchestration.data import _Dataset
from kithara_ray.sft.collate import collate
from kithara_ray.sft.order import Order
from kithara_ray.sft.tokenize import RowTokenizer, TokenizedBlock, TokenizedRow

logger = logging.getLogger(__name__)

# Tokenising tasks in flight beyond which the source is not read further.
_MAX_TASKS = 16
# Sequence lengths are multiples of this: a TPU register has 128 lanes; on a CPU padding is only work.
LENGTH_MULTIPLE = {"tpu": 128}
_CPU_LENGTH_MULTIPLE = 8
# Room for predictions in a pack, over the mean: the head's work grows with it, and what does not fit waits for a pack.
_PREDICTIONS_MARGIN = 1.15
_COUNTS = {
    "dropped_untrained": "were dropped because truncation left nothing to train",
    "skipped_bad": "were skipped as bad",
    "truncated": "were truncated",
}


@dataclass(frozen=True)
class TokenStore:
    """A tokenised dataset in the object store.

    Attributes:
        blocks: references to `TokenizedBlock`s, in the dataset's order.
        lengths: tokens of every row, int32 (N,), over all blocks; row numbers are positions in it.
        trained: trained tokens of every row, int32 (N,).
        starts: the number of the first row of each block, and the total, int64 (len(blocks) + 1,).
        pad_id: the tokenizer's.
        content: a hash of all tokens and masks in their order, however they are cut into blocks.
    """

    blocks: tuple[ray.ObjectRef, ...]
    lengths: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    pad_id: int
    content: str = ""

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    def batch_shape(self, platform: str) -> tuple[int, int]:
        """(T, K) of every batch: the longest row and the most trained tokens of a row, rounded up for the platform."""
        return _rounded(int(self.lengths.max()), platform), _rounded(int(self.trained.max()), platform)

    def packed_shape(self, platform: str, max_seq_len: int) -> tuple[int, int]:
        """(T, K) of packed batches: `max_seq_len`, and a little more than the share of its tokens that is trained."""
        seq_len = _rounded(max_seq_len, platform)
        share = self.trained.sum(dtype=np.int64) / self.lengths.sum(dtype=np.int64)
        predictions = max(int(self.trained.max()), int(_PREDICTIONS_MARGIN * share * seq_len))
        return seq_len, min(seq_len, _rounded(predictions, platform))

    def head(self, num_rows: int) -> "TokenStore":
        """The first rows alone."""
        return dataclasses.replace(self, lengths=self.lengths[:num_rows], trained=self.trained[:num_rows])


def _rounded(count: int, platform: str) -> int:
    multiple = LENGTH_MULTIPLE.get(platform, _CPU_LENGTH_MULTIPLE)
    return -(-count // multiple) * multiple


@ray.remote(num_returns=2, num_cpus=1)
def _tokenize_block(tokenize: RowTokenizer, block, first_row: int):
    """One block of the source, tokenised; and what the driver must know of it."""
    import pyarrow as pa

    rows = block.to_pylist() if isinstance(block, pa.Table) else block.to_dict(orient="records")
    tokenized = tokenize(rows, first_row)
    counts = {name: getattr(tokenized, name) for name in _COUNTS}
    trained = np.asarray([row.loss_mask.sum() for row in tokenized.rows()], np.int32)
    return tokenized, (tokenized.lengths, trained, counts, list(tokenized.samples), tokenized.content())


def _source_blocks(dataset: _Dataset) -> Iterator[tuple[ray.ObjectRef, int, int]]:
    """(reference, rows, number of the first row) of the source's blocks, in order, as Ray Data makes them."""
    rows = dataset.rows()
    # The default lets blocks come as they are ready; then the same data has another order every time.
    rows.context.execution_options.preserve_order = True
    rows.context.enable_progress_bars = False
    # Ray Data tells of its progress bars and of each execution; what a user must know is in the run's own progress.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    first = 0
    for bundle in rows.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            count = entry.metadata.num_rows
            yield entry.ref, count, first
            first += count


def tokenize(dataset: _Dataset) -> TokenStore:
    """Tokenise a dataset by tasks on the cluster's CPUs.

    Raises:
        DataError: a bad row (its number and column), or no row that trains anything.
    """
    row_tokenizer = dataset.row_tokenizer()
    shared = ray.put(row_tokenizer)
    blocks, summaries = [], []
    total = 0
    for block, count, first in _source_blocks(dataset):
        if len(summaries) >= _MAX_TASKS:
            ray.wait(summaries, num_returns=len(summaries) - _MAX_TASKS + 1, fetch_local=False)
        tokens, summary = _tokenize_block.remote(shared, block, first)
        blocks.append(tokens)
        summaries.append(summary)
        total += count
    try:
        results = ray.get(summaries)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, DataError) else error from None
    counts = {name: sum(result[2][name] for result in results) for name in _COUNTS}
    samples = [sample for result in results for sample in result[3]][:3]
    lengths, trained = (np.concatenate([np.zeros(0, np.int32), *(result[i] for result in results)]) for i in (0, 1))
    if any(counts.values()):
        logger.warning("of %d rows %s; for example: %s", total, _describe(counts), "; ".join(samples) or "-")
    if not len(lengths):
        what = f"of {total} rows {_describe(counts)}" if total else "the source has no rows"
        raise DataError(f"the dataset is empty: {what}; nothing can be trained")
    starts = np.cumsum([0] + [len(result[0]) for result in results])
    content = f"{sum(result[4] for result in results) % (1 << 128):032x}"
    return TokenStore(tuple(blocks), lengths, trained, starts, row_tokenizer.pad_id, content)


def _describe(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {_COUNTS[name]}" for name, count in counts.items() if count) or "none is usable"


class HostStream:
    """The global batches of a store, of which this process reads what its devices own.

    Args:
        store: the tokenised dataset.
        order: which rows are in which batch.
        shape: (T, K) of every batch.
        sharding: of the batch; rows are split, positions whole.
    """

    def __init__(self, store: TokenStore, order: Order, shape: tuple[int, int], sharding: NamedSharding):
        self.store = store
        self.order = order
        self.sharding = sharding
        self.seq_len, self.predictions = shape
        self._blocks: OrderedDict[int, tuple[TokenizedBlock, np.ndarray]] = OrderedDict()

    def batch(self, step: int) -> tuple[dict[str, jax.Array], int]:
        """The arrays of one global batch, and how many real tokens it has over all hosts."""
        packs = self.order.batch(step)
        tokens = int(self.store.lengths[np.concatenate(packs)].sum())
        parts: dict[tuple[int, int], dict[str, np.ndarray]] = {}

        def part(index: tuple[slice, ...], name: str) -> np.ndarray:
            start, stop, _ = index[0].indices(len(packs))
            if (start, stop) not in parts:
                own = [[self._row(int(row)) for row in pack] for pack in packs[start:stop]]
                parts[start, stop] = collate(own, self.seq_len, self.predictions, self.store.pad_id)
            return parts[start, stop][name]

        def array(name: str, width: int) -> jax.Array:
            return jax.make_array_from_callback((len(packs), width), self.sharding, lambda index: part(index, name))

        widths = dict.fromkeys(("token_ids", "segment_ids"), self.seq_len)
        widths |= dict.fromkeys(("target_positions", "target_ids", "target_weights"), self.predictions)
        return {name: array(name, width) for name, width in widths.items()}, tokens

    def _row(self, row: int) -> TokenizedRow:
        number = int(np.searchsorted(self.store.starts, row, side="right")) - 1
        block, ends = self._block(number)
        within = row - int(self.store.starts[number])
        stop = int(ends[within])
        start = stop - int(block.lengths[within])
        return TokenizedRow(block.token_ids[start:stop], block.loss_mask[start:stop])

    def _block(self, number: int) -> tuple[TokenizedBlock, np.ndarray]:
        """A block and the ends of its rows; the object store's own memory, mapped and not copied."""
        if number not in self._blocks:
            block = ray.get(self.store.blocks[number])
            self._blocks[number] = (block, np.cumsum(block.lengths))
        self._blocks.move_to_end(number)
        while len(self._blocks) > 64:
            self._blocks.popitem(last=False)
        return self._blocks[number]
