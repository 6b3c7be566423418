"""The driver's decisions about one dataset of a run: plain data that is sent to every worker process."""

from dataclasses import dataclass

from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.orchestration.data.unbounded import EndlessStore


@dataclass(frozen=True)
class DataSpec:
    """One tokenised dataset and how it is cut into batches.

    Attributes:
        rows_per_device: rows per device in one step, over all its micro-batches.
        packed_len: tokens of a row into which several samples are packed; None packs nothing.
        buckets: without packing, the maximum number of padded batch lengths. Each length compiles a program.
        shuffle_rows: see `kithara_ray.sft.batches.order`.
    """

    store: TokenStore | EndlessStore
    rows_per_device: int
    packed_len: int | None
    buckets: int
    shuffle: bool
    shuffle_rows: int | None
    seed: int
