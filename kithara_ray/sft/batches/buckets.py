"""Choose lengths for padded batches: few, because each is a program to compile, and close to the rows' own."""

import numpy as np

# Another length must save at least this share of the computed positions, and this many per epoch. Computing fewer
# takes no longer than compiling another program.
_MIN_SAVING = 0.1
MIN_SAVED_POSITIONS = 1 << 14


def bucket_lengths(
    lengths: np.ndarray, most: int, multiple: int, min_saved: int = MIN_SAVED_POSITIONS
) -> tuple[int, ...]:
    """Return up to `most` lengths, ascending multiples of `multiple`; the last is enough for the longest row.

    These lengths minimise padding if each row is padded to the next one. There are fewer than `most` if another length
    would save less than a tenth, or less than `min_saved` positions per epoch. The result depends only on `lengths`.

    Args:
        lengths: int (N,), tokens in every row.
    """
    candidates, counts = np.unique(-(-np.asarray(lengths, np.int64) // multiple) * multiple, return_counts=True)
    rows = np.cumsum(counts)
    # cost[i]: positions of the rows up to candidate i, with candidate i as the last of the lengths chosen so far.
    cost = rows * candidates
    chosen = [[i] for i in range(len(candidates))]
    for _ in range(1, most):
        # (previous last, last): rows between the two are padded to the last.
        added = cost[:, None] + (rows[None, :] - rows[:, None]) * candidates[None, :]
        added[np.tril_indices(len(candidates))] = np.iinfo(np.int64).max
        previous = added.argmin(axis=0)
        better = added.min(axis=0)
        if cost[-1] - better[-1] < max(min_saved, _MIN_SAVING * cost[-1]):
            break
        chosen = [chosen[p] + [i] if better[i] < cost[i] else chosen[i] for i, p in enumerate(previous)]
        cost = np.minimum(cost, better)
    return tuple(int(candidates[i]) for i in chosen[-1])
