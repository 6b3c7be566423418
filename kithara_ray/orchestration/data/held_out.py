"""Hold part of a dataset out of training, for evaluation. The choice is a function of the data and the seed."""

import dataclasses
import logging
from typing import Any

import numpy as np
import ray

from kithara_ray.errors import DataError, UnsupportedError
from kithara_ray.orchestration.data.pipeline import Described, Mixture, named, tokenize_whole
from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.sft.batches.blocks import TokenizedBlock
from kithara_ray.sft.batches.told import NOTHING

logger = logging.getLogger(__name__)

# Separates this draw from those of the shuffle, which are keyed by the seed and the epoch.
_STREAM = 0x4E1D


def tokenize_and_hold_out(
    dataset: Described | Mixture, fraction: float, seed: int, vocabulary: int | None = None
) -> tuple[TokenStore, TokenStore]:
    """Return (training rows, held-out rows) of a dataset, or of each dataset of a mixture.

    The number held out is `fraction` of the trainable rows, rounded, and at least one. Both parts keep the dataset's
    order, and no row is in both.

    Raises:
        DataError: see `tokenize`; or a dataset has too few rows for both parts.
        UnsupportedError: the dataset streams.
    """
    if isinstance(dataset, Mixture):
        parts = [tokenize_and_hold_out(part, fraction, seed, vocabulary) for part in named(dataset.datasets)]
        trained, held = ([part[i] for part in parts] for i in (0, 1))
        draws = dataset.draws([store.num_rows for store in trained])
        return TokenStore.joined(trained, draws), TokenStore.joined(held, [store.num_rows for store in held])
    if dataset.is_endless:
        raise UnsupportedError("eval_fraction: the dataset streams, so its rows are not known; give an eval_dataloader")
    store = tokenize_whole(dataset, vocabulary)
    held = chosen(store.num_rows, fraction, seed)
    logger.warning(
        "eval_fraction=%g, seed=%d: %d of %d rows%s are held out of training",
        *(fraction, seed, held.sum(), store.num_rows, f" of {dataset.name}" if dataset.name else ""),
    )
    return _divided(store, held)


def chosen(num_rows: int, fraction: float, seed: int) -> np.ndarray:
    """Return the mask of held-out rows, bool (num_rows,). Raises DataError if no row would be left to train on."""
    count = max(1, round(fraction * num_rows))
    if count >= num_rows:
        raise DataError(
            f"eval_fraction={fraction:g} holds out {count} of {num_rows} row(s), which leaves none to train on; give "
            "more rows, or a smaller fraction"
        )
    order = np.random.Generator(np.random.Philox(key=[seed, _STREAM])).permutation(num_rows)
    held = np.zeros(num_rows, bool)
    held[order[:count]] = True
    return held


@ray.remote(num_returns=3, num_cpus=1)
def _divide(block: TokenizedBlock, held: np.ndarray):
    """Return (rows not held out, held-out rows, the two parts' contents)."""
    parts = block.where(~held), block.where(held)
    return *parts, tuple(part.content() for part in parts)


def _divided(store: TokenStore, held: np.ndarray) -> tuple[TokenStore, TokenStore]:
    ends = zip(store.starts[:-1], store.starts[1:], strict=True)
    divided: list[Any]  # three references each
    divided = [_divide.remote(block, held[a:b]) for block, (a, b) in zip(store.blocks, ends, strict=True)]
    contents = ray.get([contents for *_, contents in divided])
    stores = []
    for side, rows in enumerate((~held, held)):
        stores.append(
            dataclasses.replace(
                store,
                blocks=tuple(parts[side] for parts in divided),
                lengths=store.lengths[rows],
                trained=store.trained[rows],
                starts=np.concatenate([[0], np.cumsum(rows)])[store.starts],
                content=f"{sum(content[side] for content in contents) % (1 << 128):032x}",
            )
        )
    train, evaluation = stores
    # The dropped and skipped rows are reported once, with the training part.
    return train, dataclasses.replace(evaluation, counts=dict.fromkeys(store.counts, 0), unread=(), told=NOTHING)
