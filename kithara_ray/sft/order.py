"""The sequence of global batches: a function of (number of rows, batch size, seed, epoch, step) and of nothing else.

Not of the number of hosts, of timing or of failures. Every row is in exactly one batch of an epoch; the last batch of
an epoch is filled up with padding rows.
"""

from dataclasses import dataclass

import numpy as np

from kithara_ray.errors import ConfigError

PADDING_ROW = -1


@dataclass(frozen=True)
class BatchOrder:
    """Which rows are in which global batch.

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
        if self.num_rows < 1 or self.batch_rows < 1:
            raise ConfigError(f"num_rows and batch_rows must be >= 1, got {self.num_rows} and {self.batch_rows}")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.batch_rows)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """All rows in the order of one epoch, int64 (num_rows,)."""
        if not self.shuffle:
            return np.arange(self.num_rows)
        # Philox is counter-based and its stream specified, so the order does not hang on numpy's default generator.
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_rows)

    def batch(self, step: int) -> np.ndarray:
        """Row numbers of the global batch of `step` (0-based), int64 (batch_rows,), PADDING_ROW where there is none."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self._epoch(epoch)[index * self.batch_rows : (index + 1) * self.batch_rows]
        return np.pad(rows, (0, self.batch_rows - len(rows)), constant_values=PADDING_ROW)

    def _epoch(self, epoch: int) -> np.ndarray:
        """The last epoch asked for is kept: steps of one epoch follow each other."""
        cached = self.__dict__.get("_last")
        if cached is None or cached[0] != epoch:
            cached = (epoch, self.epoch_rows(epoch))
            object.__setattr__(self, "_last", cached)
        return cached[1]
