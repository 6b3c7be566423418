"""The choices that can be made about the computation of a model, and their names; no jax, no keras."""

from dataclasses import dataclass

from kithara_ray.errors import ConfigError

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


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is built, besides what its config.json, its LoRA settings and its mesh say.

    Attributes:
        precision: "float32", "bfloat16" or "mixed_bfloat16" (activations in bfloat16).
        scan: run equal blocks as one scan. False is for decoding, and the reference in tests.
        remat: what the scanned blocks keep for the backward pass, one of REMAT.
        stack_factors: train the factors, or the weights, of the scanned blocks as stacked arrays; for optimizers that
            treat every element by itself.
        quantize: "int8" holds the kernels of linear layers as int8, see `quantized`; embedding, head and norms stay.
        train_weights: train all weights and not an adapter.

    Raises:
        ConfigError: an unknown precision, remat or quantize.
    """

    precision: str = "mixed_bfloat16"
    scan: bool = True
    remat: str = "block"
    stack_factors: bool = True
    quantize: str | None = None
    train_weights: bool = False

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.remat not in REMAT:
            raise ConfigError(f"remat must be one of {', '.join(REMAT)}, got {self.remat!r}")
        if self.quantize not in QUANTIZATIONS:
            raise ConfigError(f"quantize must be one of {QUANTIZATIONS}, got {self.quantize!r}")


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
