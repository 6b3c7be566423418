"""Turn a described dataset into a tokenised one: tasks on the cluster's CPUs tokenise the source's blocks.

A few rows are tokenised in the driver.
"""

import collections
import copy
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import ray

from kithara_ray.errors import DataError
from kithara_ray.orchestration.data import sources
from kithara_ray.orchestration.data.sources import COUNTS, Work
from kithara_ray.orchestration.data.tasks import Tasks, causes, outcome, summary_of
from kithara_ray.orchestration.data.token_store import TokenStore, describe
from kithara_ray.orchestration.data.unbounded import SLICE_ROWS, UNREAD, EndlessStore, start_reader
from kithara_ray.sft.batches.blocks import TokenizedRow
from kithara_ray.sft.batches.told import Told
from kithara_ray.sft.rows.columns import unread
from kithara_ray.sft.rows.listing import Choice
from kithara_ray.sft.tokens.tokenize import RowTokenizer

logger = logging.getLogger(__name__)

# Maximum tokenising tasks in flight; beyond it, reading the source pauses.
_MAX_TASKS = 16


class Described(Protocol):
    """A dataset of the public API, see `datasets`: the location of its rows, and the way to tokenise them."""

    source: Any
    choice: Choice
    name: str
    max_seq_len: int

    @property
    def is_endless(self) -> bool: ...

    def row_tokenizer(self) -> RowTokenizer: ...


@runtime_checkable
class Mixture(Protocol):
    """Several datasets used as one."""

    @property
    def datasets(self) -> Sequence[Described]: ...

    def draws(self, sizes: Sequence[int]) -> tuple[int, ...]: ...


def tokenize(dataset: Described | Mixture, vocabulary: int | None = None) -> TokenStore | EndlessStore:
    """Tokenise a dataset, or those of a mixture: by tasks on the cluster's CPUs, or here if it has only a few rows.

    Args:
        vocabulary: number of tokens the model knows. A row with a token outside it is bad.

    Raises:
        DataError: a row is bad (the error gives its source, number and column), or no row has a trainable token.
    """
    if isinstance(dataset, Mixture):
        stores = [tokenize_whole(part, vocabulary) for part in named(dataset.datasets)]
        return TokenStore.joined(stores, dataset.draws([store.num_rows for store in stores]))
    row_tokenizer = dataclasses.replace(dataset.row_tokenizer(), vocabulary=vocabulary)
    if dataset.is_endless:
        return start_reader(dataset.source, dataset.max_seq_len, row_tokenizer)
    works = sources.work(dataset.source, dataset.name, dataset.choice)
    first, rest = sources.few(works)
    blocks, results = _here(row_tokenizer, first) if rest is None else _in_tasks(row_tokenizer, rest)
    lengths, trained = (np.concatenate([np.zeros(0, np.int32), *(result[i] for result in results)]) for i in (0, 1))
    counts, unread_columns, told = _concluded(len(lengths), [result[2] for result in results])
    starts = np.cumsum([0] + [len(result[0]) for result in results])
    content = f"{sum(result[3] for result in results) % (1 << 128):032x}"
    said = counts, unread_columns, told
    return TokenStore(tuple(blocks), lengths, trained, starts, row_tokenizer.pad_id, content, *said)


def _here(tokenize: RowTokenizer, works: Sequence[tuple[Work, tuple]]) -> tuple[list, list]:
    """Tokenise a few rows in this process, which has the tokenizer: a task would take seconds to start and load it."""
    blocks, results = [], []
    for work, part in works:
        if part:
            rows, start, stop = part
            block = work.tokenize(tokenize, ray.get(rows), start, stop)
        else:
            block = work.tokenize(tokenize)
        blocks.append(ray.put(block))
        results.append(summary_of(block))
    return blocks, results


def _in_tasks(tokenize: RowTokenizer, works: Iterable[tuple[Work, tuple]]) -> tuple[list, list]:
    tasks = Tasks(tokenize)
    blocks, summaries, results = [], collections.deque(), []
    with causes():
        for work, part in works:
            if len(summaries) >= _MAX_TASKS:
                results.append(ray.get(summaries.popleft()))
            tokens, summary = tasks.start(work, part)
            blocks.append(tokens)
            summaries.append(summary)
        results += ray.get(list(summaries))
    return blocks, results


def tokenized_rows(dataset: Described | Mixture) -> Iterator[TokenizedRow]:
    """Yield the training rows of a dataset or a mixture, in order, tokenised in this process.

    A streaming source is read once; only a Ray Dataset needs Ray.

    Raises:
        DataError: see `tokenize`.
    """
    if isinstance(dataset, Mixture):
        for part in named(dataset.datasets):
            yield from tokenized_rows(part)
        return
    row_tokenizer = dataset.row_tokenizer()
    if dataset.is_endless:
        works = ((piece, ()) for piece in sources.stream(dataset.source, SLICE_ROWS))
    else:
        works = sources.work(dataset.source, dataset.name, dataset.choice)
    kept, outcomes = 0, []
    for piece, part in works:
        held: tuple[Any, ...] = (ray.get(part[0]), *part[1:]) if part else ()
        block, rows = piece.tokenized_rows(row_tokenizer, *held)
        kept += len(block)
        outcomes.append(outcome(block))
        yield from rows
    _concluded(kept, outcomes)


def _concluded(kept: int, outcomes: Sequence[tuple]) -> tuple[dict[str, int], tuple[str, ...], Told]:
    """Sum up and log all rows: return counts, unread columns and other messages.

    Args:
        kept: number of rows to train on.
        outcomes: see `tasks.outcome`.

    Raises:
        DataError: there is no row to train on.
    """
    counts = {name: sum(outcome[0][name] for outcome in outcomes) for name in COUNTS}
    samples = [sample for outcome in outcomes for sample in outcome[1]][:3]
    unread_columns = unread(outcome[2] for outcome in outcomes)
    total = kept + counts["dropped_untrained"] + counts["skipped_bad"]
    if any(counts.values()):
        logger.warning("of %d rows %s; for example: %s", total, describe(counts), "; ".join(samples) or "-")
    if unread_columns:
        logger.warning(UNREAD, ", ".join(map(repr, unread_columns)))
    told = Told.joined(outcome[3] for outcome in outcomes)
    for line in told.lines():
        logger.warning("%s", line)
    if not kept:
        what = f"of {total} rows {describe(counts)}: {samples[0]}" if samples else "the source has no rows"
        raise DataError(f"the dataset is empty: {what}; nothing can be trained")
    return counts, unread_columns, told


def tokenize_whole(dataset: Described | Mixture, vocabulary: int | None = None) -> TokenStore:
    """Call `tokenize` for a dataset that ends; others have been refused by then."""
    store = tokenize(dataset, vocabulary)
    assert isinstance(store, TokenStore)
    return store


def named(datasets: Sequence[Described]) -> Iterator[Described]:
    """Yield each dataset, named by its position in the mixture."""
    for number, dataset in enumerate(datasets):
        named = copy.copy(dataset)
        named.name = f"dataset {number} of the mixture"
        yield named
