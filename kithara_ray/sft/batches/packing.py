"""Several samples in one row of a batch: best fit within a bounded window of open rows.

A pure function of the samples' sizes in their order, so every host comes to the same packs by itself.
"""

from collections.abc import Iterable, Iterator

import numpy as np

# Rows that are open at a time. More of them fill better and take longer: at 128, real chat data fills 98 % and more.
WINDOW = 128


def best_fit(
    samples: np.ndarray, lengths: np.ndarray, trained: np.ndarray, seq_len: int, predictions: int, window: int = WINDOW
) -> tuple[np.ndarray, np.ndarray]:
    """Packs of samples, none longer than `seq_len` tokens or with more than `predictions` trained ones.

    Args:
        samples: int (N,), in the order in which they come.
        lengths, trained: int, tokens and trained tokens of each sample, by its number.

    Returns: the samples pack by pack, int64 (N,), and where each pack begins, with the end behind, int64 (packs + 1,).
    """
    sizes = zip(samples.tolist(), lengths[samples].tolist(), trained[samples].tolist(), strict=True)
    rows: list[int] = []
    starts = [0]
    for pack in packs(sizes, seq_len, predictions, window):
        rows += pack
        starts.append(len(rows))
    return np.asarray(rows, np.int64), np.asarray(starts, np.int64)


def packs(
    sizes: Iterable[tuple[int, int, int]], seq_len: int, predictions: int, window: int = WINDOW
) -> Iterator[list[int]]:
    """Packs as they are closed, of samples as they come: (sample, tokens, trained tokens).

    A sample goes into the open row whose tokens it fills best; if that has no room for its predictions, into the row
    with the most room, and if that has none, into a new one. If `window` are open then, the fullest is closed first. A
    row that nothing more fits into is closed at once. Every sample alone must fit.
    """
    # Open rows by the tokens they have room for, and that number's bit set where there are any: the lowest bit from a
    # sample's size on is the best fit, the highest the most room. Both are found without looking at the rows.
    open_rows: dict[int, list[tuple[list[int], int]]] = {}
    rooms = count = 0
    for sample, tokens, wanted in sizes:
        place = None
        if fitting := rooms >> tokens << tokens:
            for room in ((fitting & -fitting).bit_length() - 1, fitting.bit_length() - 1):
                place = next((i for i, (_, left) in enumerate(open_rows[room]) if left >= wanted), None)
                if place is not None:
                    break
        if place is None and count == window:
            room = (rooms & -rooms).bit_length() - 1
            yield open_rows[room].pop(0)[0]
        elif place is not None:
            pack, left = open_rows[room].pop(place)
        if place is not None or count == window:
            count -= 1
            if not open_rows[room]:
                rooms ^= 1 << room
        if place is None:
            pack, left, room = [], predictions, seq_len
        pack.append(sample)
        room, left = room - tokens, left - wanted
        if room == 0 or left == 0:
            yield pack
            continue
        open_rows.setdefault(room, []).append((pack, left))
        rooms |= 1 << room
        count += 1
    # The fullest first, as they would have been closed.
    for room in sorted(open_rows):
        yield from (pack for pack, _ in open_rows[room])
