"""Options of a model's computation, and their names; no jax, no keras."""

import math
from dataclasses import dataclass

from kithara_ray.errors import ConfigError

# Keras dtype policies, which set the dtype of activations and of the matrix products.
PRECISIONS = ("float32", "bfloat16", "mixed_bfloat16")

# Storage of linear layers' kernels; without one they keep the checkpoint's dtype.
QUANTIZATIONS = ("int8", "int4", "nf4")

# Policies for the arrays that a decoder block keeps for its backward pass. Gathered weights are never kept: they would
# be the whole model on each device.
# "block": only the block's input; the rest is computed again.
# "attention": also attention's output, so that attention is not computed again.
# "projections": also queries, keys, values and the result of attention's last product. Of the products with weights,
# only the MLP's are computed again.
# "offload": the same arrays as "projections" and the block's input, in the host's memory.
# "dots": the results of all products with weights, so that only norms, rope and activations are computed again.
# "nested": only the inputs of groups of blocks, about as many groups as the square root of the number of blocks. A
# group runs once more to restore the inputs within it. This costs one more forward pass and its gathers. It is meant
# for models whose kept inputs are too large under "block".
OFFLOAD = "offload"
REMAT = ("block", "attention", "projections", OFFLOAD, "dots", "nested")
# The planner chooses, see `plan.choose`; where it cannot, it is the default.
AUTO = "auto"
REMAT_DEFAULT = "block"
# Policies under which attention runs once per step.
KEEPS_ATTENTION = ("attention", "projections", OFFLOAD, "dots")
# Policies that keep queries, keys and values, and those that keep the result of attention's last product.
KEEPS_INPUTS = ("projections", OFFLOAD, "dots")
KEEPS_PROJECTIONS = ("projections", OFFLOAD)
# Keys of a block of attention's fused backward kernel, and the longest row that takes it; see `fuses_backward`. Longer
# blocks do not fit the memory of a v5e's core.
FUSED_KEYS, FUSED_LIMIT = 1024, 8192

# Tokens of a chunk on one device. Products read a block's weights once per chunk, so a chunk must be large enough to
# be efficient. Up to twice as many tokens form one chunk.
_CHUNK_TOKENS = 1024
# Tokens that each expert of a mixture should get of a chunk. Its matrices are read once for them, and the compiler's
# kernel takes them 128 at a time.
_EXPERT_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Settings for building a model, besides its config.json, its LoRA settings and its mesh.

    Attributes:
        precision: "float32", "bfloat16" or "mixed_bfloat16" (activations in bfloat16).
        scan: run equal blocks as one scan. False is for decoding, and for the reference in tests.
        remat: the arrays that scanned blocks keep for the backward pass, one of REMAT.
        stack_factors: train the scanned blocks' factors, or their weights, as stacked arrays. This is for optimizers
            that update each element separately.
        quantize: "int8", "int4" or "nf4" holds the kernels of linear layers as integers, see `quantized`; embedding,
            head and norms stay.
        train_weights: train all weights instead of an adapter.
        routed: compute the chosen experts of a mixture only. None does so in the scan, on a TPU or on a mesh with the
            axis `expert`; other devices compute all experts faster.
        router_aux_loss_coef: factor of the routers' auxiliary loss in training; 0 leaves it out.

    Raises:
        ConfigError: an unknown precision, remat or quantize, or a negative factor.
    """

    precision: str = "mixed_bfloat16"
    scan: bool = True
    remat: str = "block"
    stack_factors: bool = True
    quantize: str | None = None
    train_weights: bool = False
    routed: bool | None = None
    router_aux_loss_coef: float = 0.0

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.remat not in REMAT:
            raise ConfigError(f"remat must be one of {', '.join(REMAT)}, got {self.remat!r}")
        if self.quantize not in (None, *QUANTIZATIONS):
            raise ConfigError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {self.quantize!r}")
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise ConfigError(f"router_aux_loss_coef must be a number >= 0, got {self.router_aux_loss_coef!r}")


def fuses_backward(remat: str, positions: int) -> bool:
    """True if attention's backward pass on a TPU is one kernel of five products instead of two kernels of seven.

    The one kernel writes a part of the queries' gradient, as large as the queries, for each block of keys. Policies
    that save memory, rows of more than 8,192 positions, and long rows that blocks of 1,024 do not divide take the two.
    """
    divides = positions <= FUSED_KEYS or positions % FUSED_KEYS == 0
    return remat in KEEPS_ATTENTION and positions <= FUSED_LIMIT and divides


def groups_of(steps: int) -> int:
    """Number of equal groups that "nested" divides the scan's steps into: the divisor that keeps the fewest inputs."""
    return min((g for g in range(1, steps + 1) if steps % g == 0), key=lambda g: (g + steps // g, g))


def chunk_length(rows: int, positions: int, remat: str, share: float = 1.0) -> int:
    """Positions in a decoder block's chunk, see `stack`: the largest divisor that keeps it within `_CHUNK_TOKENS`.

    A chunk takes all positions if they are few, or if no divisor comes near the limit. Lengths
    on a TPU are multiples of 128, so they have such divisors.

    Args:
        rows: rows of one device.
        remat: "dots" keeps arrays inside the block for all positions, so the block is not cut.
        share: the share of its experts that a routed mixture sends a token to, which makes chunks longer.
    """
    tokens = max(_CHUNK_TOKENS, int(_EXPERT_TOKENS / share)) if share < 1 else _CHUNK_TOKENS
    if remat == "dots" or rows * positions <= 2 * tokens:
        return positions
    bound = max(1, tokens // rows)
    longest = max(c for c in range(1, bound + 1) if positions % c == 0)
    return longest if 2 * longest > bound else positions
