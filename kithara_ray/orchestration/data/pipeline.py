"""A described dataset to a tokenised one: the source's blocks go through tokenising tasks on the cluster's CPUs."""

import collections
import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import ray

from kithara_ray.errors import DataError
from kithara_ray.orchestration.data import sources
from kithara_ray.orchestration.data.sources import COUNTS, tokenize_rows
from kithara_ray.orchestration.data.token_store import TokenStore, describe
from kithara_ray.orchestration.data.unbounded import EndlessStore, start_reader
from kithara_ray.sft.tokens.tokenize import RowTokenizer

logger = logging.getLogger(__name__)

# Tokenising tasks in flight beyond which the source is not read further.
_MAX_TASKS = 16


class Described(Protocol):
    """A dataset of the public API, see `datasets`: where its rows are, and how they become tokens."""

    source: Any
    name: str
    max_seq_len: int

    @property
    def is_endless(self) -> bool: ...

    def row_tokenizer(self) -> RowTokenizer: ...


@runtime_checkable
class Mixture(Protocol):
    """Several datasets as one."""

    datasets: Sequence[Described]

    def draws(self, sizes: Sequence[int]) -> tuple[int, ...]: ...


def tokenize(dataset: Described | Mixture, vocabulary: int | None = None) -> TokenStore | EndlessStore:
    """Tokenise a dataset, or those of a mixture, by tasks on the cluster's CPUs.

    Args:
        vocabulary: tokens the model knows; a row with others is bad.

    Raises:
        DataError: a bad row (its source, number and column), or no row that trains anything.
    """
    if isinstance(dataset, Mixture):
        stores = [tokenize(part, vocabulary) for part in _named(dataset.datasets)]
        return TokenStore.joined(stores, dataset.draws([store.num_rows for store in stores]))
    row_tokenizer = dataclasses.replace(dataset.row_tokenizer(), vocabulary=vocabulary)
    if dataset.is_endless:
        return start_reader(dataset.source, dataset.max_seq_len, row_tokenizer)
    shared = ray.put(row_tokenizer)
    blocks, summaries, results = [], collections.deque(), []
    try:
        for piece, part in sources.work(dataset.source, dataset.name):
            if len(summaries) >= _MAX_TASKS:
                results.append(ray.get(summaries.popleft()))
            tokens, summary = tokenize_rows.remote(shared, piece, *part)
            blocks.append(tokens)
            summaries.append(summary)
        results += ray.get(list(summaries))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, DataError) else error from None
    counts = {name: sum(result[2][name] for result in results) for name in COUNTS}
    samples = [sample for result in results for sample in result[3]][:3]
    lengths, trained = (np.concatenate([np.zeros(0, np.int32), *(result[i] for result in results)]) for i in (0, 1))
    total = len(lengths) + counts["dropped_untrained"] + counts["skipped_bad"]
    if any(counts.values()):
        logger.warning("of %d rows %s; for example: %s", total, describe(counts), "; ".join(samples) or "-")
    if not len(lengths):
        what = f"of {total} rows {describe(counts)}: {samples[0]}" if samples else "the source has no rows"
        raise DataError(f"the dataset is empty: {what}; nothing can be trained")
    starts = np.cumsum([0] + [len(result[0]) for result in results])
    content = f"{sum(result[4] for result in results) % (1 << 128):032x}"
    return TokenStore(tuple(blocks), lengths, trained, starts, row_tokenizer.pad_id, content, counts)


def _named(datasets: Sequence[Described]) -> Iterator[Described]:
    """Each knowing which of the mixture it is."""
    for number, dataset in enumerate(datasets):
        named = copy.copy(dataset)
        named.name = f"dataset {number} of the mixture"
        yield named
