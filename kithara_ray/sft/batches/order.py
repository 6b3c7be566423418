"""The sequence of global batches, a function of only (the rows' sizes, batch size, seed, epoch, step).

The number of hosts, timing and failures do not affect it. Every row of the dataset is in exactly one batch of an epoch.
Empty rows fill the last batch. A row of a batch holds one row of the dataset, or several with packing; this module
calls either a pack.
"""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from kithara_ray.errors import ConfigError
from kithara_ray.sft.batches.packing import best_fit

# Row numbers of the dataset, int64; empty if none are left for this row of the batch.
Pack = np.ndarray
_EMPTY = np.empty(0, np.int64)
# A windowed shuffle moves stretches of this part of a window through the whole dataset.
_STRETCHES_OF_WINDOW = 16


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture: rows `start` to `stop` of the whole, from which each epoch takes `draws`.

    Epochs go through one order of the part after another, so no row repeats before all have been taken.
    """

    start: int
    stop: int
    draws: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Order(ABC):
    """Base of all orders: finds the batch of a step from an epoch's packs.

    Attributes:
        batch_rows: rows of a global batch.
        seed: seed of the epochs' orders.
        shuffle: False keeps the dataset's order in every epoch.
        shuffle_rows: size of the shuffle window, for data that is too large for random access. Stretches of a sixteenth
            of a window are spread over the dataset, then each window is shuffled. With None, or with the number of
            rows, every order is equally likely.
        parts: datasets of a mixture; empty for a dataset from which an epoch takes every row once.
    """

    batch_rows: int
    seed: int = 0
    shuffle: bool = True
    shuffle_rows: int | None = None
    parts: tuple[Part, ...] = ()

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows of the dataset, numbered 0 .. num_rows - 1."""

    @abstractmethod
    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's rows pack by pack, and the offset of each pack, followed by the end."""

    @property
    def epoch_size(self) -> int:
        """Number of rows in an epoch."""
        return sum(part.draws for part in self.parts) if self.parts else self.num_rows

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """The rows in the order of one epoch, int64 (epoch_size,)."""
        if not self.parts:
            return self._order(self.num_rows, epoch)
        rows = [self._draws(number, part, epoch) for number, part in enumerate(self.parts)]
        # Interleave evenly: the k-th of n draws is at (k + 1/2) / n of the epoch.
        places = np.concatenate([(np.arange(len(r)) + 0.5) / max(len(r), 1) for r in rows])
        mixed = np.concatenate(rows)[np.argsort(places, kind="stable")]
        if self.shuffle:
            rng = _rng(self.seed, epoch)
            window = self._window(len(mixed))
            mixed = rng.permutation(mixed) if window == len(mixed) else _mixed(mixed, window, rng)
        return mixed

    def _draws(self, number: int, part: Part, epoch: int) -> np.ndarray:
        size = part.stop - part.start
        first = epoch * part.draws
        cycles = range(first // size, -(-(first + part.draws) // size))
        orders = [self._order(size, cycle, number + 1) for cycle in cycles] or [_EMPTY]
        offset = first - cycles.start * size
        return part.start + np.concatenate(orders)[offset : offset + part.draws]

    def _order(self, size: int, cycle: int, stream: int = 0) -> np.ndarray:
        if not self.shuffle:
            return np.arange(size)
        rng = _rng(self.seed, cycle, stream)
        window = self._window(size)
        if window == size:
            return rng.permutation(size)
        stretch = max(1, window // _STRETCHES_OF_WINDOW)
        starts = rng.permutation(-(-size // stretch)) * stretch
        rows = (starts[:, None] + np.arange(stretch)).ravel()
        return _mixed(rows[rows < size], window, rng)

    def _window(self, size: int) -> int:
        """Size of the shuffle window for this many rows; `size` itself to shuffle them all at once."""
        return size if self.shuffle_rows is None else min(self.shuffle_rows, size)

    def steps_of(self, epoch: int) -> int:
        """Number of batches in one epoch."""
        return -(-self.epoch_size // self.batch_rows)

    def total_steps(self, epochs: int) -> int:
        return epochs * self.steps_of(0)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of a step, all 0-based."""
        return divmod(step, self.steps_of(0))

    def batch(self, step: int) -> list[Pack]:
        """The packs of the global batch of `step` (0-based), `batch_rows` of them."""
        epoch, index = self.locate(step)
        rows, starts = self.plan(epoch)
        bounds = starts[index * self.batch_rows : (index + 1) * self.batch_rows + 1]
        packs = [rows[start:stop] for start, stop in itertools.pairwise(bounds)]
        return packs + [_EMPTY] * (self.batch_rows - len(packs))

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `_plan` of an epoch, cached for the last one, because consecutive steps share an epoch."""
        cached = self.__dict__.get("_last")
        if cached is None or cached[0] != epoch:
            cached = (epoch, self._plan(epoch))
            object.__setattr__(self, "_last", cached)
        return cached[1]

    def __post_init__(self):
        if self.num_rows < 1 or self.batch_rows < 1:
            raise ConfigError(f"num_rows and batch_rows must be >= 1, got {self.num_rows} and {self.batch_rows}")


def _mixed(rows: np.ndarray, window: int, rng: np.random.Generator) -> np.ndarray:
    """Shuffle consecutive windows of rows separately."""
    windows = np.arange(len(rows)) // window
    return rows[np.lexsort((rng.random(len(rows)), windows))]


def _rng(seed: int, cycle: int, stream: int = 0) -> np.random.Generator:
    # Philox is counter-based and its streams are specified, so the order does not depend on numpy's default generator.
    return np.random.Generator(np.random.Philox(key=[seed, cycle], counter=[0, 0, 0, stream]))


@dataclass(frozen=True, eq=False)
class BatchOrder(Order):
    """One row of the dataset in each row of a batch.

    With `lengths`, rows of similar length share a batch, which reduces padding. Each window of `BATCHES` batches is
    sorted by length and cut into batches, which are then shuffled. Without shuffling, rows keep the dataset's order.

    Attributes:
        size: number of rows in the dataset.
        lengths: tokens in every row, int (size,).
    """

    BATCHES = 64

    size: int
    lengths: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return self.size

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.epoch_rows(epoch)
        if self.lengths is not None and self.shuffle:
            rows = self._by_length(rows, self.lengths, _rng(self.seed, epoch, 2**32))
        return rows, np.arange(len(rows) + 1)

    def _by_length(self, rows: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        places = np.arange(len(rows))
        windows = places // (self.BATCHES * self.batch_rows)
        # Longest first, so that the incomplete batch has short rows; it stays the last of the epoch.
        rows = rows[np.lexsort((places, -lengths[rows], windows))]
        full = len(rows) // self.batch_rows
        batches = np.arange(full)
        batches = batches[np.lexsort((rng.random(full), batches // self.BATCHES))]
        head = rows[: full * self.batch_rows].reshape(full, self.batch_rows)[batches]
        return np.concatenate([head.ravel(), rows[full * self.batch_rows :]])


@dataclass(frozen=True, eq=False)
class PackedOrder(Order):
    """Each row of a batch holds as many rows of the dataset as fit, packed in the order of the epoch.

    Packs differ between epochs, and so may the number of batches. To find a step, each earlier epoch is packed once,
    which takes about a microsecond per row.

    Attributes:
        lengths, trained: tokens and trained tokens of every row of the dataset, int (num_rows,).
        seq_len, predictions: limits on the tokens and trained tokens in a row of a batch.
    """

    lengths: np.ndarray
    trained: np.ndarray
    seq_len: int
    predictions: int
    _steps: dict[int, int] = field(init=False, repr=False, default_factory=dict)  # epoch -> number of batches

    def __post_init__(self):
        super().__post_init__()
        longest, most = int(self.lengths.max()), int(self.trained.max())
        assert longest <= self.seq_len, f"a row of {longest} tokens for packs of {self.seq_len}"
        assert most <= self.predictions, f"a row of {most} trained tokens for packs of {self.predictions}"

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    def steps_of(self, epoch: int) -> int:
        """Cached for each epoch, so that a run packs an epoch once or twice, and not at every step."""
        if epoch not in self._steps:
            self._steps[epoch] = -(-(len(self.plan(epoch)[1]) - 1) // self.batch_rows)
        return self._steps[epoch]

    def total_steps(self, epochs: int) -> int:
        return sum(self.steps_of(epoch) for epoch in range(epochs))

    def locate(self, step: int) -> tuple[int, int]:
        epoch = 0
        while step >= self.steps_of(epoch):
            step -= self.steps_of(epoch)
            epoch += 1
        return epoch, step

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return best_fit(self.epoch_rows(epoch), self.lengths, self.trained, self.seq_len, self.predictions)
