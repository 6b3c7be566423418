"""Tokenised rows, and blocks of them laid end to end.

T is a row's length in tokens, N the number of rows in a block. `loss_mask[t] == 1` if and only if token t is trained,
that is, predicted from position t-1. So `loss_mask[0]` is always 0.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class TokenizedRow:
    token_ids: np.ndarray  # int32 (T,)
    loss_mask: np.ndarray  # uint8 (T,)
    truncated: bool = False  # True if max_seq_len cut off the last trained token or any before it
    unlearned: int = 0  # assistant messages that the chat template later shows in another form
    place: str = ""  # in the source, such as "line 18 of train.jsonl"; empty if not requested
    notes: tuple[str, ...] = ()  # remarks on the row

    @property
    def is_trained(self) -> bool:
        return bool(self.loss_mask.any())


@dataclass(frozen=True, eq=False)
class TokenizedBlock:
    """N rows laid end to end, in source order, and counts of the others."""

    row_ids: np.ndarray  # int64 (N,), the row's place in the source
    lengths: np.ndarray  # int32 (N,)
    token_ids: np.ndarray  # int32 (sum of lengths,)
    loss_mask: np.ndarray  # uint8 (sum of lengths,)
    dropped_untrained: int = 0  # rows without trained tokens after truncation
    skipped_bad: int = 0  # bad rows, under on_bad_row="skip"
    truncated: int = 0  # rows kept, but cut at max_seq_len
    unlearned_messages: int = 0  # in rows kept
    samples: tuple[str, ...] = ()  # messages about the first dropped or skipped rows
    columns: tuple[tuple[str, bool], ...] = ()  # (name, True if it was read in any row) of non-empty columns
    formats: Mapping[str, int] = field(default_factory=dict)  # format -> number of rows read in it
    notes: Mapping[str, int] = field(default_factory=dict)  # note -> number of kept rows to which it applies

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.row_ids, self.lengths, self.token_ids, self.loss_mask))

    def trained(self) -> np.ndarray:
        """Number of trained tokens in each row, int32 (N,)."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])
        return (before[ends] - before[ends - self.lengths]).astype(np.int32)

    def where(self, chosen: np.ndarray) -> "TokenizedBlock":
        """Return the rows for which `chosen`, bool (N,), is true, without the counts of other rows."""
        tokens = np.repeat(chosen, self.lengths)
        kept = self.row_ids[chosen], self.lengths[chosen], self.token_ids[tokens], self.loss_mask[tokens]
        return TokenizedBlock(*kept)

    def content(self) -> int:
        """128-bit hash of the rows' tokens, masks and places in the source; add those of several blocks modulo 2**128.

        The sum is the same however the source is cut into blocks.
        """
        total = 0
        for row_id, row in zip(self.row_ids.tolist(), self.rows(), strict=True):
            digest = hashlib.sha256(row_id.to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(row.token_ids).data)
            digest.update(np.ascontiguousarray(row.loss_mask).data)
            total += int.from_bytes(digest.digest()[:16], "little")
        return total % (1 << 128)

    def rows(self) -> Iterator[TokenizedRow]:
        ends = np.cumsum(self.lengths, dtype=np.int64)
        for start, end in zip(ends - self.lengths, ends, strict=True):
            yield TokenizedRow(self.token_ids[start:end], self.loss_mask[start:end])
