"""Which lengths batches are padded to: few, for each is a program to compile, and close to the rows' own."""

import numpy as np

# A further length must save so much of the positions that are computed, and so many an epoch: less than those take no
# longer than to compile its program.
_MIN_SAVING = 0.1
MIN_SAVED_POSITIONS = 1 << 14


def bucket_lengths(
    lengths: np.ndarray, most: int, multiple: int, min_saved: int = MIN_SAVED_POSITIONS
) -> tuple[int, ...]:
    """Up to `most` lengths, ascending multiples of `multiple`, of which the last holds the longest row.

    They are those that pad the rows least, if each row is padded to the next of them; fewer than `most` where a further
    one would save less than a tenth, or less than `min_saved` positions an epoch. A function of the lengths alone.

    Args:
        lengths: int (N,), tokens of every row.
    """
    candidates, counts = np.unique(-(-np.asarray(lengths, np.int64) // multiple) * multiple, return_counts=True)
    rows = np.cumsum(counts)
    # cost[i]: positions of the rows up to candidate i, with candidate i as the last of so many lengths.
    cost = rows * candidates
    chosen = [[i] for i in range(len(candidates))]
    for _ in range(1, most):
        # (previous last, last): what the rows between the two are padded to is the last.
        added = cost[:, None] + (rows[None, :] - rows[:, None]) * candidates[None, :]
        added[np.tril_indices(len(candidates))] = np.iinfo(np.int64).max
        previous = added.argmin(axis=0)
        better = added.min(axis=0)
        if cost[-1] - better[-1] < max(min_saved, _MIN_SAVING * cost[-1]):
            break
        chosen = [chosen[p] + [i] if better[i] < cost[i] else chosen[i] for i, p in enumerate(previous)]
        cost = np.minimum(cost, better)
    return tuple(int(candidates[i]) for i in chosen[-1])
