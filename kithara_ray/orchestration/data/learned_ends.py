"""The tokens that end the trained part of rows in a tokenised dataset. A trained model stops at them."""

from collections.abc import Collection
from typing import Any

import numpy as np
import ray

from kithara_ray.orchestration.data.pipeline import tokenize
from kithara_ray.orchestration.data.sources import FEW_ROWS
from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.sft.batches.blocks import TokenizedBlock
from kithara_ray.sft.tokens.tokenizer import SpecialTokens

# Rows to inspect of a source without an end.
_LOOKED_AT = 64


def learned_ends(store: Any, dataset: Any) -> tuple[int, ...]:
    """Return the ids of the special tokens that end rows which were not cut, ascending.

    Args:
        store: the tokenised dataset.
        dataset: its description. If the source has no end, its first rows are read and tokenised here.
    """
    if not isinstance(store, TokenStore):
        store = tokenize(dataset.head(_LOOKED_AT))
    parts = getattr(dataset, "datasets", (dataset,))
    cut = tuple({part.max_seq_len for part in parts})
    if store.num_rows <= FEW_ROWS:
        found = set().union(*(last_tokens(store.block(number), cut) for number in range(len(store.blocks))))
    else:
        found = set().union(*ray.get([_last_tokens.remote(block, cut) for block in store.blocks]))
    return tuple(sorted(found & SpecialTokens.of(parts[0].row_tokenizer().loaded()).all_ids))


@ray.remote(num_cpus=0)
def _last_tokens(block: TokenizedBlock, cut: Collection[int]) -> set[int]:
    return last_tokens(block, cut)


def last_tokens(block: TokenizedBlock, cut: Collection[int]) -> set[int]:
    """Return the last tokens of a block's rows, if they are trainable.

    Args:
        cut: lengths at which rows may have been truncated; rows of such a length are ignored.
    """
    last = np.cumsum(block.lengths, dtype=np.int64) - 1
    tells = ~np.isin(block.lengths, list(cut)) & (block.loss_mask[last] == 1)
    return set(np.unique(block.token_ids[last[tells]]).tolist())
