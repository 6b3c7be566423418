"""Pack several samples into one row of a batch, by best fit within a bounded window of open rows.

Packing is a pure function of the samples' sizes and order, so every host computes the same packs.
"""

from collections.abc import Iterable, Iterator

import numpy as np

# Rows open at a time. A larger window fills rows better and takes longer: at 128, real chat data fills at least 98 %.
WINDOW = 128


def best_fit(
    samples: np.ndarray, lengths: np.ndarray, trained: np.ndarray, seq_len: int, predictions: int, window: int = WINDOW
) -> tuple[np.ndarray, np.ndarray]:
    """Pack samples so that no pack has more than `seq_len` tokens or `predictions` trained tokens.

    Args:
        samples: int (N,), in order of arrival.
        lengths, trained: int, tokens and trained tokens of each sample, by its number.

    Returns: the samples pack by pack, int64 (N,), and the offset of each pack, followed by the end, int64 (packs + 1,).
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
    """Yield packs as they close, from a stream of (sample, tokens, trained tokens).

    A sample goes into the open row that it fills best. If that row has no room for its predictions, the sample goes
    into the row with the most room. If that has none, a new row opens; if `window` rows are open, the fullest closes
    first. A full row closes at once. Every single sample must fit into a row.
    """
    # Open rows by their free tokens, and a bit set with one bit for each such number. The lowest bit at or above a
    # sample's size is the best fit, the highest bit is the most room. Neither requires looking at the rows.
    open_rows: dict[int, list[tuple[list[int], int]]] = {}
    rooms = count = room = left = 0
    pack: list[int] = []
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
    # Fullest first, the order in which they would have closed.
    for room in sorted(open_rows):
        yield from (pack for pack, _ in open_rows[room])
