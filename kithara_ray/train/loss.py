"""Next-token cross-entropy whose logits never exist whole.

    B  rows    T  positions    C  positions of one chunk    D  hidden width    V  vocabulary

Position t predicts token t + 1. The head and the softmax run over chunks of positions, and the backward pass computes
each chunk's logits again instead of keeping them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Logits of one chunk, over all rows of the global batch: 2**25 float32 are 128 MiB, split over the batch's devices.
_CHUNK_LOGITS = 2**25


def chunk_length(rows: int, positions: int, vocabulary: int) -> int:
    """The largest divisor of `positions` whose chunk of logits stays within bounds, at least 1."""
    bound = max(1, _CHUNK_LOGITS // (rows * vocabulary))
    return max(c for c in range(1, positions + 1) if positions % c == 0 and c <= bound)


def summed_cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocabulary: int,
) -> jax.Array:
    """Sum over positions of weight * -log p(target), float32.

    Args:
        head: hidden states (..., D) to logits (..., V).
        targets_BT: int, the token that each position predicts.
        weights_BT: float32, 0 where nothing is trained.
    """
    rows, positions, _ = hidden_BTD.shape
    c = chunk_length(rows, positions, vocabulary)

    def chunks(array):
        """(B, T, ...) to (T / C, B, C, ...)."""
        return jnp.moveaxis(array.reshape(rows, positions // c, c, *array.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(total, chunk):
        hidden_BCD, targets_BC, weights_BC = chunk
        logits_BCV = head(hidden_BCD).astype(jnp.float32)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        # A masked sum and not a gather: the vocabulary may be split over devices.
        is_target_BCV = jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]
        picked_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1)
        return total + jnp.sum(weights_BC * (log_z_BC - picked_BC)), None

    total, _ = jax.lax.scan(one, jnp.float32(0), (chunks(hidden_BTD), chunks(targets_BT), chunks(weights_BT)))
    return total
