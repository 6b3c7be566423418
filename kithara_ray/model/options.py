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


def groups_of(steps: int) -> int:
    """Into how many equal groups "nested" parts the steps of the scan: the divisor that keeps the fewest inputs."""
    return min((g for g in range(1, steps + 1) if steps % g == 0), key=lambda g: (g + steps // g, g))
