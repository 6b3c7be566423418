"""Batches from sources of unknown length, such as a streaming Hugging Face dataset.

One actor reads the source and has tasks tokenise its rows. It shuffles the rows within consecutive windows, packs them
if requested, and hands the same global batches to all hosts. When the source ends, it begins again.

The sequence of batches is a function of the source's rows, the batch size, the seed and the step. To resume at step k,
the actor reads and tokenises the source again from its start, because its rows cannot be numbered without reading
them. Resuming therefore repeats the sequence only if the source gives the same rows in the same order.
"""

import itertools
import logging
import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from kithara_ray.errors import DataError
from kithara_ray.orchestration.data.sources import COUNTS, stream
from kithara_ray.orchestration.data.tasks import Tasks, causes
from kithara_ray.orchestration.data.token_store import describe, rounded
from kithara_ray.sft.batches.blocks import TokenizedRow
from kithara_ray.sft.batches.packing import packs
from kithara_ray.sft.batches.told import Told
from kithara_ray.sft.rows.columns import unread
from kithara_ray.sft.tokens.tokenize import RowTokenizer

logger = logging.getLogger(__name__)

# Rows of a stream in one task.
SLICE_ROWS = 256
# The log's line about unread columns, written once for each.
UNREAD = "unread columns: %s; to read one, name it in column_mapping"
_MAX_TASKS = 4
# Rows shuffled with each other, if the Dataloader sets no number.
WINDOW_ROWS = 4096
# Batches that the actor keeps for slower hosts.
_KEPT_BATCHES = 8


@dataclass(frozen=True)
class EndlessOrder:
    """The known parameters of the sequence of batches."""

    batch_rows: int
    seed: int
    shuffle: bool
    shuffle_rows: int
    num_rows: int = 0
    parts: tuple = ()

    def locate(self, step: int) -> tuple[int, int]:
        return 0, step

    def steps_of(self, epoch: int) -> float:
        return math.inf


@dataclass(frozen=True)
class EndlessStore:
    """The counterpart of a TokenStore for a stream: it holds the actor that reads the source."""

    reader: ActorHandle
    pad_id: int
    max_seq_len: int
    content: str = "endless"

    @property
    def num_rows(self) -> None:
        """The number of rows is unknown."""

    def shapes(self, platform: str, packed_len: int | None, buckets: int) -> tuple[tuple[int, int], ...]:
        """Return (T, K) of batches: `max_seq_len` and, without packing, its halves. Any token may be trainable."""
        lengths = {rounded(self.max_seq_len >> i, platform) for i in range(buckets if packed_len is None else 1)}
        return tuple((length, length) for length in sorted(lengths))


@ray.remote(num_cpus=0)
class Reader:
    """Reads one source from its start, as far as batches are requested."""

    def __init__(self, source: Any, tokenizer: RowTokenizer):
        self._source, self._tasks = source, Tasks(tokenizer)
        self._how: tuple | None = None
        self._counts = dict.fromkeys(COUNTS, 0)
        self._unread: set[str] = set()
        self._told = Told()

    def batch(self, step: int, order: EndlessOrder, shape: tuple[int, int] | None) -> list[list[TokenizedRow]]:
        """Return the packs of a step's global batch.

        Args:
            shape: (T, K) of packs; None packs nothing.
        """
        if self._how != (order, shape) or step < self._next - len(self._kept):
            self._how, self._next, self._kept = (order, shape), 0, OrderedDict()
            self._packs = self._all_packs(order, shape)
        while self._next <= step:
            self._kept[self._next] = list(itertools.islice(self._packs, order.batch_rows))
            self._next += 1
            if len(self._kept) > _KEPT_BATCHES:
                self._kept.popitem(last=False)
        return self._kept[step]

    def _all_packs(self, order: EndlessOrder, shape: tuple[int, int] | None) -> Iterator[list[TokenizedRow]]:
        rows = self._windows(order)
        if shape is None:
            return ([row] for row in rows)
        held: dict[int, TokenizedRow] = {}

        def sizes():
            for number, row in enumerate(rows):
                held[number] = row
                yield number, len(row.token_ids), int(row.loss_mask.sum())

        return ([held.pop(number) for number in pack] for pack in packs(sizes(), *shape))

    def _windows(self, order: EndlessOrder) -> Iterator[TokenizedRow]:
        rows = self._rows()
        for number in itertools.count():
            window = list(itertools.islice(rows, order.shuffle_rows if order.shuffle else SLICE_ROWS))
            if order.shuffle:
                rng = np.random.Generator(np.random.Philox(key=[order.seed, number]))
                window = [window[i] for i in rng.permutation(len(window))]
            yield from window

    def _rows(self) -> Iterator[TokenizedRow]:
        """Yield the rows of one pass over the source after another."""
        while True:
            found = 0
            for row in self._once():
                found += 1
                yield row
            if not found:
                raise DataError(f"the streaming source has nothing to train on: {describe(self._counts)}")

    def _once(self) -> Iterator[TokenizedRow]:
        works, pending = stream(self._source, SLICE_ROWS), deque()
        while True:
            if work := next(works, None):
                with causes():
                    pending.append(self._tasks.start(work))
            while pending and (len(pending) >= _MAX_TASKS or not work):
                with causes():
                    block, summary = ray.get(list(pending.popleft()))
                self._report(summary)
                yield from block.rows()
            if not work:
                return

    def _report(self, summary: tuple) -> None:
        counts, samples, columns, told = summary[2]
        for line in told.beyond(self._told).lines():
            logger.warning("streamed so far: %s", line)
        self._told = Told.joined([self._told, told])
        if new := [name for name in unread([columns]) if name not in self._unread]:
            self._unread.update(new)
            logger.warning(UNREAD, ", ".join(map(repr, new)))
        self._counts = {name: self._counts[name] + counts[name] for name in COUNTS}
        if counts["dropped_untrained"] or counts["skipped_bad"]:
            logger.warning("streamed so far: rows that %s; for example: %s", describe(self._counts), "; ".join(samples))


def start_reader(source: Any, max_seq_len: int, tokenizer: RowTokenizer) -> EndlessStore:
    """Start the actor that reads the source. Raises DataError if the source cannot be sent to an actor."""
    try:
        reader: Any = Reader.remote(source, tokenizer)
    except TypeError as error:
        raise DataError(f"the streaming source cannot be sent to the cluster: {error}") from error
    return EndlessStore(reader, tokenizer.pad_id, max_seq_len)
