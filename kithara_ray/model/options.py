"""Names of the choices a driver can make about the computation; no jax, no keras."""

# Keras dtype policies: of activations and of the matrix products.
PRECISIONS = ("float32", "bfloat16", "mixed_bfloat16")

# What the kernels of linear layers are held as; None keeps the checkpoint's dtype.
QUANTIZATIONS = (None, "int8")

# What a decoder block keeps for its backward pass. "block": its input alone, the rest is computed again. "dots": also
# the results of products with weights, so that only norms, rope and attention are computed again. Gathered weights are
# never kept, they would be the whole model on each device.
REMAT = ("block", "dots")
