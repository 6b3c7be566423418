"""The sequence of global batches: a function of (the rows' sizes, batch size, seed, epoch, step) and of nothing else.

Not of the number of hosts, of timing or of failures. Every row of the dataset is in exactly one batch of an epoch; the
last batch of an epoch is filled up with empty rows. A row of a batch holds one row of the dataset, or with packing
several; either is called a pack here.
"""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from kithara_ray.errors import ConfigError
from kithara_ray.sft.packing import first_fit

# Row numbers of the dataset, int64; empty where a batch has no more.
Pack = np.ndarray
_EMPTY = np.empty(0, np.int64)


class Order(ABC):
    """What both orders share: from an epoch's packs to the batch of a step."""

    num_rows: int
    batch_rows: int
    seed: int
    shuffle: bool

    @abstractmethod
    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The dataset's rows pack by pack, and where each pack begins, with the end behind."""

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """All rows in the order of one epoch, int64 (num_rows,)."""
        if not self.shuffle:
            return np.arange(self.num_rows)
        # Philox is counter-based and its stream specified, so the order does not hang on numpy's default generator.
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_rows)

    def steps_of(self, epoch: int) -> int:
        """Batches of one epoch."""
        return -(-(len(self.plan(epoch)[1]) - 1) // self.batch_rows)

    def total_steps(self, epochs: int) -> int:
        return sum(self.steps_of(epoch) for epoch in range(epochs))

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of a step, all 0-based."""
        epoch = 0
        while step >= self.steps_of(epoch):
            step -= self.steps_of(epoch)
            epoch += 1
        return epoch, step

    def batch(self, step: int) -> list[Pack]:
        """The packs of the global batch of `step` (0-based), `batch_rows` of them."""
        epoch, index = self.locate(step)
        rows, starts = self.plan(epoch)
        bounds = starts[index * self.batch_rows : (index + 1) * self.batch_rows + 1]
        packs = [rows[start:stop] for start, stop in itertools.pairwise(bounds)]
        return packs + [_EMPTY] * (self.batch_rows - len(packs))

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """`_plan`, the last epoch's kept: steps of one epoch follow each other."""
        cached = self.__dict__.get("_last")
        if cached is None or cached[0] != epoch:
            cached = (epoch, self._plan(epoch))
            object.__setattr__(self, "_last", cached)
        return cached[1]

    def _check(self) -> None:
        if self.num_rows < 1 or self.batch_rows < 1:
            raise ConfigError(f"num_rows and batch_rows must be >= 1, got {self.num_rows} and {self.batch_rows}")


@dataclass(frozen=True)
class BatchOrder(Order):
    """One row of the dataset in each row of a batch.

    Attributes:
        num_rows: rows of the dataset, numbered 0 .. num_rows - 1.
        batch_rows: rows of a global batch.
        seed: of the epochs' permutations.
        shuffle: False keeps the dataset's order in every epoch.
    """

    num_rows: int
    batch_rows: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self):
        self._check()

    def steps_of(self, epoch: int) -> int:
        return -(-self.num_rows // self.batch_rows)

    def locate(self, step: int) -> tuple[int, int]:
        return divmod(step, self.steps_of(0))

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return self.epoch_rows(epoch), np.arange(self.num_rows + 1)


@dataclass(frozen=True, eq=False)
class PackedOrder(Order):
    """As many rows of the dataset in each row of a batch as fit, packed in the order of the epoch.

    Epochs have different packs, and may differ by a batch in their number.

    Attributes:
        lengths, trained: tokens and trained tokens of every row of the dataset, int (num_rows,).
        seq_len, predictions: what a row of a batch has room for.
        batch_rows, seed, shuffle: as BatchOrder's.
    """

    lengths: np.ndarray
    trained: np.ndarray
    seq_len: int
    predictions: int
    batch_rows: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self):
        self._check()
        longest, most = int(self.lengths.max()), int(self.trained.max())
        assert longest <= self.seq_len, f"a row of {longest} tokens for packs of {self.seq_len}"
        assert most <= self.predictions, f"a row of {most} trained tokens for packs of {self.predictions}"
        object.__setattr__(self, "_steps", {})

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    def steps_of(self, epoch: int) -> int:
        """Kept for each epoch, so that a run of many epochs packs each of them once or twice, not once a step."""
        if epoch not in self._steps:
            self._steps[epoch] = super().steps_of(epoch)
        return self._steps[epoch]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return first_fit(self.epoch_rows(epoch), self.lengths, self.trained, self.seq_len, self.predictions)
