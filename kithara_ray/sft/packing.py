"""Several samples in one row of a batch: first fit within a bounded window of open rows.

A pure function of the samples' sizes in their order, so every host comes to the same packs by itself.
"""

import numpy as np

# Rows that are open at a time. More of them fill better and take longer: at 128, real chat data fills 98 % and more.
WINDOW = 128


def first_fit(
    samples: np.ndarray, lengths: np.ndarray, trained: np.ndarray, seq_len: int, predictions: int, window: int = WINDOW
) -> tuple[np.ndarray, np.ndarray]:
    """Packs of samples, none longer than `seq_len` tokens or with more than `predictions` trained ones.

    Each sample goes into the first open row that has room; where none has, a row is opened, and if `window` are open,
    the fullest is closed first. Every sample alone must fit.

    Args:
        samples: int (N,), in the order in which they come.
        lengths, trained: int, tokens and trained tokens of each sample, by its number.

    Returns: the samples pack by pack, int64 (N,), and where each pack begins, with the end behind, int64 (packs + 1,).
    """
    room = np.zeros((window, 2), np.int64)  # tokens and predictions left in each open row
    is_open = np.zeros(window, bool)
    opened = np.zeros(window, np.int64)  # when, so that the first open row is the first opened
    contents: list[list[int]] = [[] for _ in range(window)]
    packs: list[list[int]] = []
    sizes = np.stack([lengths[samples], trained[samples]], axis=1).astype(np.int64)
    for count, (sample, size) in enumerate(zip(samples.tolist(), sizes, strict=True)):
        fits = np.flatnonzero(is_open & (room >= size).all(axis=1))
        if len(fits):
            row = fits[opened[fits].argmin()]
        else:
            if is_open.all():
                row = room[:, 0].argmin()
                packs.append(contents[row])
            else:
                row = is_open.argmin()
            room[row], is_open[row], opened[row], contents[row] = (seq_len, predictions), True, count, []
        room[row] -= size
        contents[row].append(sample)
    left = np.flatnonzero(is_open)
    packs += [contents[row] for row in left[opened[left].argsort()]]
    starts = np.cumsum([0] + [len(pack) for pack in packs])
    return np.concatenate([np.empty(0, np.int64), *map(np.asarray, packs)]).astype(np.int64), starts.astype(np.int64)
