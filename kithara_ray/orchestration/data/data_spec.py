"""What the driver has decided about one dataset of a run: plain data that is carried to every worker's process."""

from dataclasses import dataclass

from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.orchestration.data.unbounded import EndlessStore


@dataclass(frozen=True)
class DataSpec:
    """One tokenised dataset and how it is cut into batches.

    Attributes:
        rows_per_device: of one step, all its micro-batches together.
        packed_len: tokens of a row into which several samples are packed; None packs nothing.
        buckets: without packing, to how many lengths batches may be padded; each is a program to compile.
        shuffle_rows: see `kithara_ray.sft.batches.order`.
    """

    store: TokenStore | EndlessStore
    rows_per_device: int
    packed_len: int | None
    buckets: int
    shuffle: bool
    shuffle_rows: int | None
    seed: int
