"""Names of the choices a driver can make about the computation; no jax, no keras."""

# Keras dtype policies: of activations and of the matrix products.
PRECISIONS = ("float32", "bfloat16", "mixed_bfloat16")

# What the kernels of linear layers are held as; None keeps the checkpoint's dtype.
QUANTIZATIONS = (None, "int8")

# What a decoder block keeps for its backward pass. "block": its input alone, the rest is computed again. "dots": also
# the results of products with weights, so that only norms, rope and attention are computed again. Gathered weights are
# never kept, they would be the whole model on each device. "nested": the inputs of groups of blocks, about as many as
# the root of the blocks' number; a group is run once more to have the inputs within it. Slower by a forward pass and
# its gathers, for models whose kept inputs alone are too much.
REMAT = ("block", "dots", "nested")

# Tokens of a chunk on one device: enough for products to be efficient, which read a block's weights once a chunk. Up to
# twice as many are one chunk.
_CHUNK_TOKENS = 1024


def groups_of(steps: int) -> int:
    """Into how many equal groups "nested" parts the steps of the scan: the divisor that keeps the fewest inputs."""
    return min((g for g in range(1, steps + 1) if steps % g == 0), key=lambda g: (g + steps // g, g))


def chunk_length(rows: int, positions: int, remat: str) -> int:
    """Positions of a decoder block's chunk, see `stack`: the largest divisor that keeps it within `_CHUNK_TOKENS`; all
    where they are few, or where no divisor comes near: those of a TPU are multiples of 128.

    Args:
        rows: of one device.
        remat: under "dots" what is inside the block is kept, of all positions.
    """
    if remat == "dots" or rows * positions <= 2 * _CHUNK_TOKENS:
        return positions
    bound = max(1, _CHUNK_TOKENS // rows)
    longest = max(c for c in range(1, bound + 1) if positions % c == 0)
    return longest if 2 * longest > bound else positions
