"""Next-token cross-entropy that never holds all logits at once.

    B  rows    K  predictions of a row    C  predictions of one chunk    D  hidden width    V  vocabulary

The head and the softmax run over chunks of predictions. A chunk's gradient, softmax minus target, goes back through the
head while the chunk's logits exist. The logits are therefore computed once, and the backward pass keeps nothing of
their size. The arrays that it keeps have the size of the hidden states.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# Logits of one chunk over all rows of the global batch. The limit is 128 MiB of float32 in all, or 64 MiB on each of
# the devices that split them, whichever is more. With many devices, a smaller chunk would wait for its collectives.
_CHUNK_LOGITS = 2**25
_DEVICE_LOGITS = 2**24

Head = Callable[[Any, jax.Array], jax.Array]


def chunk_length(rows: int, predictions: int, vocabulary: int, devices: int = 1) -> int:
    """The largest divisor of `predictions` whose chunk of logits stays within bounds, at least 1."""
    bound = max(1, max(_CHUNK_LOGITS, _DEVICE_LOGITS * devices) // (rows * vocabulary))
    return max(c for c in range(1, predictions + 1) if predictions % c == 0 and c <= bound)


def summed_cross_entropy(
    head: Head,
    trained: Any,
    hidden_BKD: jax.Array,
    targets_BK: jax.Array,
    weights_BK: jax.Array,
    vocabulary: int,
    devices: int = 1,
) -> jax.Array:
    """Sum over predictions of weight * -log p(target), float32; differentiable in `trained` and `hidden_BKD`.

    Args:
        head: maps (trained, hidden (..., D)) to logits (..., V).
        trained: a pytree of the head's trained arrays; empty if the head is frozen.
        targets_BK: int, the token to be predicted.
        weights_BK: float32, 0 where there is no target.
        devices: number of devices that each hold a part of a chunk's logits.
    """
    rows, predictions, _ = hidden_BKD.shape
    chunk = chunk_length(rows, predictions, vocabulary, devices)
    return _summed(head, chunk, trained, hidden_BKD, targets_BK, weights_BK)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(head: Head, chunk: int, trained, hidden_BKD, targets_BK, weights_BK) -> jax.Array:
    def one(total, parts):
        hidden_BCD, targets_BC, weights_BC = parts
        return total + _chunk_loss(head(trained, hidden_BCD), targets_BC, weights_BC)[0], None

    return jax.lax.scan(one, jnp.float32(0), _chunks(chunk, hidden_BKD, targets_BK, weights_BK))[0]


def _summed_forward(head: Head, chunk: int, trained, hidden_BKD, targets_BK, weights_BK):
    """The sum, and its gradients for an incoming gradient of 1."""

    def one(carry, parts):
        total, d_trained = carry
        hidden_BCD, targets_BC, weights_BC = parts
        logits_BCV, head_backward = jax.vjp(head, trained, hidden_BCD)
        loss, d_logits_BCV = _chunk_loss(logits_BCV, targets_BC, weights_BC)
        d_chunk, d_hidden_BCD = head_backward(d_logits_BCV.astype(logits_BCV.dtype))
        d_trained = jax.tree.map(lambda total, d: total + d.astype(jnp.float32), d_trained, d_chunk)
        return (total + loss, d_trained), d_hidden_BCD

    start = jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
    parts = _chunks(chunk, hidden_BKD, targets_BK, weights_BK)
    (total, d_trained), d_hidden = jax.lax.scan(one, start, parts)
    d_trained = jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), d_trained, trained)
    return total, (d_trained, jnp.moveaxis(d_hidden, 0, 1).reshape(hidden_BKD.shape))


def _summed_backward(head: Head, chunk: int, kept, d_total):
    d_trained, d_hidden_BKD = jax.tree.map(lambda d: (d_total * d).astype(d.dtype), kept)
    return d_trained, d_hidden_BKD, None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _chunk_loss(logits_BCV, targets_BC, weights_BC) -> tuple[jax.Array, jax.Array]:
    """(sum of weight * -log p(target), its gradient for the logits), float32."""
    parts = logits_BCV.astype(jnp.float32), targets_BC, weights_BC
    return jax.lax.platform_dependent(*parts, cpu=_exponentials_once, default=_exponentials_twice)


def _exponentials_twice(logits_BCV, targets_BC, weights_BC) -> tuple[jax.Array, jax.Array]:
    """Write only the logits and their gradient to memory, on platforms that fuse a sum with its operand."""
    log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    # Use a masked sum instead of a gather: the vocabulary may be split over devices.
    is_target_BCV = _is_target_BCV(logits_BCV, targets_BC)
    picked_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1)
    d_logits_BCV = weights_BC[..., None] * (jnp.exp(logits_BCV - log_z_BC[..., None]) - is_target_BCV)
    return jnp.sum(weights_BC * (log_z_BC - picked_BC)), d_logits_BCV


def _exponentials_once(logits_BCV, targets_BC, weights_BC) -> tuple[jax.Array, jax.Array]:
    """Compute the exponentials once: on CPU, sums do not fuse with a mask, and fused sums slow exponentials down."""
    largest_BC = jnp.max(logits_BCV, axis=-1)
    exponentials_BCV = jax.lax.optimization_barrier(jnp.exp(logits_BCV - largest_BC[..., None]))
    sum_BC = jnp.sum(exponentials_BCV, axis=-1)
    picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    on_target_BCV = jnp.where(_is_target_BCV(logits_BCV, targets_BC), weights_BC[..., None], 0)
    d_logits_BCV = (weights_BC / sum_BC)[..., None] * exponentials_BCV - on_target_BCV
    return jnp.sum(weights_BC * (jnp.log(sum_BC) + largest_BC - picked_BC)), d_logits_BCV


def _is_target_BCV(logits_BCV, targets_BC) -> jax.Array:
    return jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]


def _chunks(chunk: int, *arrays_BK: jax.Array) -> tuple[jax.Array, ...]:
    """(B, K, ...) to (K / C, B, C, ...)."""

    def split(array):
        rows, predictions, *rest = array.shape
        return jnp.moveaxis(array.reshape(rows, predictions // chunk, chunk, *rest), 1, 0)

    return tuple(split(array) for array in arrays_BK)
