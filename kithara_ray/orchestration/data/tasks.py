"""Tokenise work in Ray's tasks, and sum up a block for the driver. A task's process imports this module first."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError

from kithara_ray.errors import DataError
from kithara_ray.orchestration.data.sources import COUNTS, Work
from kithara_ray.sft.batches.blocks import TokenizedBlock
from kithara_ray.sft.batches.told import Told
from kithara_ray.sft.tokens.tokenize import RowTokenizer


@ray.remote(num_returns=2, num_cpus=1)
def tokenize_rows(tokenize: RowTokenizer, work: Work, block=None, start: int = 0, stop: int = 0):
    """Tokenise some rows of the source; return them and the facts that the driver needs about them."""
    tokenized = work.tokenize(tokenize, block, start, stop)
    return tokenized, (*summary_of(tokenized), tokenize.format.formatting_style)


def summary_of(block: TokenizedBlock) -> tuple:
    """Return what the driver needs of a block: tokens and trained tokens of each row, outcome, content."""
    return block.lengths, block.trained(), outcome(block), block.content()


class Tasks:
    """Tokenise works of one source by a task each.

    All tasks use the formatting style that the source's first deciding row gives, so the result does not depend on how
    the source is cut.
    """

    def __init__(self, tokenizer: RowTokenizer):
        self._tokenizer, self._shared = tokenizer, ray.put(tokenizer)

    def start(self, work: Work, part: tuple = ()) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        """Return references to a block and its summary. Wait for the block if its rows decide the formatting style."""
        references: Any = tokenize_rows.remote(self._shared, work, *part)
        tokens, summary = references
        if self._tokenizer.format.is_undecided and (style := ray.get(summary)[-1]) != "auto":
            decided = dataclasses.replace(self._tokenizer.format, formatting_style=style)
            self._tokenizer = dataclasses.replace(self._tokenizer, format=decided)
            self._shared = ray.put(self._tokenizer)
        return tokens, summary


def outcome(block: TokenizedBlock) -> tuple[dict[str, int], tuple[str, ...], tuple[tuple[str, bool], ...], Told]:
    """Summarise a block's rows for the driver: counts, examples, columns and messages."""
    told = Told(block.formats, block.notes)
    return {name: getattr(block, name) for name in COUNTS}, block.samples, block.columns, told


@contextlib.contextmanager
def causes() -> Iterator[None]:
    """Raise the DataError of a task instead of Ray's error about it."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, DataError) else error from None
