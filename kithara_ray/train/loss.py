"""Next-token cross-entropy whose logits never exist whole.

    B  rows    K  predictions of a row    C  predictions of one chunk    D  hidden width    V  vocabulary

The head and the softmax run over chunks of predictions, and the backward pass computes each chunk's logits again
instead of keeping them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Logits of one chunk, over all rows of the global batch: 2**25 float32 are 128 MiB, split over the batch's devices.
_CHUNK_LOGITS = 2**25


def chunk_length(rows: int, predictions: int, vocabulary: int) -> int:
    """The largest divisor of `predictions` whose chunk of logits stays within bounds, at least 1."""
    bound = max(1, _CHUNK_LOGITS // (rows * vocabulary))
    return max(c for c in range(1, predictions + 1) if predictions % c == 0 and c <= bound)


def summed_cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    hidden_BKD: jax.Array,
    targets_BK: jax.Array,
    weights_BK: jax.Array,
    vocabulary: int,
) -> jax.Array:
    """Sum over predictions of weight * -log p(target), float32.

    Args:
        head: hidden states (..., D) to logits (..., V).
        targets_BK: int, the token to be predicted.
        weights_BK: float32, 0 where there is none.
    """
    rows, predictions, _ = hidden_BKD.shape
    c = chunk_length(rows, predictions, vocabulary)

    def chunks(array):
        """(B, K, ...) to (K / C, B, C, ...)."""
        return jnp.moveaxis(array.reshape(rows, predictions // c, c, *array.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(total, chunk):
        hidden_BCD, targets_BC, weights_BC = chunk
        logits_BCV = head(hidden_BCD).astype(jnp.float32)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        # A masked sum and not a gather: the vocabulary may be split over devices.
        is_target_BCV = jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]
        picked_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1)
        return total + jnp.sum(weights_BC * (log_z_BC - picked_BC)), None

    total, _ = jax.lax.scan(one, jnp.float32(0), (chunks(hidden_BKD), chunks(targets_BK), chunks(weights_BK)))
    return total
