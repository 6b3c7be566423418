"""A dataset as tokenised blocks in Ray's object store.

    T  positions    K  predictions of a row

The driver keeps references to the tokenised blocks. They stay in the object store, which spills to disk by itself.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import ray

from kithara_ray.errors import DataError
from kithara_ray.orchestration.data.sources import COUNTS
from kithara_ray.sft.batches.blocks import TokenizedBlock
from kithara_ray.sft.batches.buckets import bucket_lengths
from kithara_ray.sft.batches.order import Part
from kithara_ray.sft.batches.told import NOTHING, Told

# Sequence lengths are multiples of this: a TPU register has 128 lanes; on a CPU, padding only adds work.
_LENGTH_MULTIPLE = {"tpu": 128}
_CPU_LENGTH_MULTIPLE = 8
# Room for predictions in a pack, relative to the mean. The head's work grows with it. Rows with many trainable tokens
# fill it before the room for tokens. Of real chat pairs in packs of 1,024, a margin of 1.15 fills 85 to 94 %, 1.5 98 %.
_PREDICTIONS_MARGIN = 1.5
# Maximum bytes of blocks that a process keeps mapped.
_KEPT_BYTES = 2**28


@dataclass(frozen=True)
class TokenStore:
    """A tokenised dataset in the object store.

    Attributes:
        blocks: references to `TokenizedBlock`s, in the dataset's order.
        lengths: tokens of every row, int32 (N,), over all blocks; row numbers are indices into it.
        trained: trained tokens of every row, int32 (N,).
        starts: number of the first row of each block, and the total, int64 (len(blocks) + 1,).
        pad_id: the tokenizer's padding id.
        content: a hash of all tokens and masks in their order, independent of the division into blocks.
        counts: numbers of dropped, skipped and truncated rows.
        unread: columns of the source that nothing reads.
        told: messages about the formats that rows were read as, and about parts of them without effect.
        parts: the datasets of a mixture.
    """

    blocks: tuple[ray.ObjectRef, ...]
    lengths: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    pad_id: int
    content: str = ""
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()
    told: Told = NOTHING
    parts: tuple[Part, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    def block(self, number: int) -> TokenizedBlock:
        """Return one of the blocks; its arrays are mapped from the object store's own memory."""
        return ray.get(self.blocks[number])

    def kept_bytes(self) -> int:
        """Bytes of blocks that one process may keep mapped: at most an eighth of this node's object store, which
        several processes share."""
        here = ray.get_runtime_context().get_node_id()
        resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
        return min(_KEPT_BYTES, int(resources.get("object_store_memory", _KEPT_BYTES * 8)) // 8)

    def shapes(self, platform: str, packed_len: int | None, buckets: int) -> tuple[tuple[int, int], ...]:
        """Return the shapes (T, K) that batches may have, ascending; the last holds every row.

        With packing there is one. Without, there are up to `buckets`: T is a length to pad to, K the largest number of
        trained tokens in a row of at most T tokens.
        """
        if packed_len is not None:
            return (self.packed_shape(platform, packed_len),)
        bounds = bucket_lengths(self.lengths, buckets, _multiple(platform))
        return tuple((t, rounded(int(self.trained[self.lengths <= t].max()), platform)) for t in bounds)

    def packed_shape(self, platform: str, max_seq_len: int) -> tuple[int, int]:
        """Return (T, K) of packed batches: T is `max_seq_len`, K slightly above the share of tokens that is trained."""
        seq_len = rounded(max_seq_len, platform)
        share = self.trained.sum(dtype=np.int64) / self.lengths.sum(dtype=np.int64)
        predictions = max(int(self.trained.max()), int(_PREDICTIONS_MARGIN * share * seq_len))
        return seq_len, min(seq_len, rounded(predictions, platform))

    def head(self, num_rows: int) -> "TokenStore":
        """Return a store of the first `num_rows` rows only."""
        return dataclasses.replace(self, lengths=self.lengths[:num_rows], trained=self.trained[:num_rows], parts=())

    @classmethod
    def joined(cls, stores: Sequence["TokenStore"], draws: Sequence[int]) -> "TokenStore":
        """Join stores as the parts of a mixture, one after the other; an epoch takes `draws` rows of each."""
        if len({store.pad_id for store in stores}) > 1:
            raise DataError("the datasets of a mixture have tokenizers with different padding")
        offsets = np.cumsum([0] + [store.num_rows for store in stores])
        parts = [Part(int(a), int(b), n) for (a, b), n in zip(itertools.pairwise(offsets), draws, strict=True)]
        return cls(
            blocks=tuple(block for store in stores for block in store.blocks),
            lengths=np.concatenate([store.lengths for store in stores]),
            trained=np.concatenate([store.trained for store in stores]),
            starts=np.concatenate([[0], *(s.starts[1:] + n for s, n in zip(stores, offsets[:-1], strict=True))]),
            pad_id=stores[0].pad_id,
            content=" ".join(store.content for store in stores),
            counts={name: sum(store.counts[name] for store in stores) for name in COUNTS},
            unread=tuple(dict.fromkeys(name for store in stores for name in store.unread)),
            told=Told.joined(store.told for store in stores),
            parts=tuple(parts),
        )


def _multiple(platform: str) -> int:
    return _LENGTH_MULTIPLE.get(platform, _CPU_LENGTH_MULTIPLE)


def rounded(count: int, platform: str) -> int:
    return -(-count // _multiple(platform)) * _multiple(platform)


def describe(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {COUNTS[name]}" for name, count in counts.items() if count) or "none is usable"
