"""Names of the choices a driver can make about the computation; no jax, no keras."""

# Keras dtype policies: of activations and of the matrix products.
PRECISIONS = ("float32", "bfloat16", "mixed_bfloat16")

# What a decoder block keeps for its backward pass. "block": its input alone, the rest is computed again. "none":
# everything but the gathered weights, which are gathered again: kept, they would be the whole model on each device.
REMAT = ("block", "none")
