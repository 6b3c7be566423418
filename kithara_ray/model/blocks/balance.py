"""The load of a mixture's experts, and the loss that keeps it even.

    L  mixtures of the model    B  rows    T  positions    E  experts    K  experts of a token

A mixture counts the real tokens of each row that it sends to each expert. Where the auxiliary loss is wanted, it also
sums the router's probabilities. Rows are summed over devices after all blocks, so no block waits for another device.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from kithara_ray.model import keras_compat
from kithara_ray.model.blocks import experts, mixtures

# Names of measures. A load has the wanted ones, float32 (B, E): the number of each expert's real tokens, and the sum of
# its probabilities over real tokens.
COUNTS, PROBABILITIES = "counts", "probabilities"
Load = Mapping[str, jax.Array]

# Measures that are wanted and the loads so far, while a block is traced.
_KEPT: ContextVar[tuple[Collection[str], list[Load]]] = ContextVar("loads", default=((), []))


@contextlib.contextmanager
def recorded(measures: Collection[str]) -> Iterator[list[Load]]:
    """Collect the loads of the mixtures that are traced while this context is active, in their order."""
    loads: list[Load] = []
    token = _KEPT.set((measures, loads))
    try:
        yield loads
    finally:
        _KEPT.reset(token)


def observe(blocks: tuple[Any, ...]) -> None:
    """Make the mixtures in these blocks record their loads; to be called after `mixtures.install`."""
    for layer in mixtures.layers_of(blocks):
        kind = type(layer).__name__
        if kind == "GptOssSparseMoeBlock":
            _observe_router(layer.router.router_dense, lambda logits: logits, layer.top_k)
        elif kind in mixtures.REPLACED:
            _observe_router(keras_compat.router_of(layer), _softmax, layer.top_k)
        else:
            layer.compute = _observed(layer.compute)


def stacked(loads: Sequence[Load]) -> Load:
    """Stack the loads of mixtures: (B, E) each to (mixtures, B, E); without mixtures, nothing."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *loads) if loads else {}


def auxiliary_loss(load: Load, tokens: jax.Array) -> jax.Array:
    """Compute the load-balancing loss, float32: E * sum over experts of (share of choices * mean probability).

    Both are means over all mixtures and real tokens together; K is the loss of an even choice. Gradients flow through
    the probabilities. Source: `load_balancing_loss_func` of transformers 5, equations (4) to (6) of
    https://arxiv.org/abs/2101.03961.

    Args:
        load: counts and probabilities, (L, E), of all rows.
        tokens: number of real tokens.
    """
    mixtures_L, experts_E = load[COUNTS].shape
    rows = jnp.maximum(tokens * mixtures_L, 1).astype(jnp.float32)
    share_E, mean_E = (jnp.sum(load[name], axis=0) / rows for name in (COUNTS, PROBABILITIES))
    return experts_E * jnp.sum(share_E * mean_E)


def fullest(counts_LE: jax.Array) -> jax.Array:
    """Return for each mixture the tokens of its fullest expert as a multiple of the mean, (L,); 1 is even."""
    return jnp.max(counts_LE, axis=-1) / jnp.maximum(jnp.mean(counts_LE, axis=-1), 1e-9)


def _softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def _observe_router(router: Any, scores_of: Callable[[jax.Array], jax.Array], chosen: int) -> None:
    """Record the load from the router's logits; a token goes to the experts of the highest scores."""
    call = router.call

    def observed(hidden_states, **given):
        # Keras tells a layer whose own `call` asks for it if it trains.
        logits = call(hidden_states, **given)
        measures, loads = _KEPT.get()
        if measures:
            real_BT = experts.real_tokens(logits.shape[:-1])
            logits_BTE = logits.reshape(*real_BT.shape, -1)
            _, chosen_BTK = jax.lax.top_k(scores_of(logits_BTE), chosen)
            load = {COUNTS: _counts_BE(chosen_BTK, logits_BTE.shape[-1])}
            if PROBABILITIES in measures:
                load[PROBABILITIES] = jnp.sum(jnp.where(real_BT[..., None], _softmax(logits_BTE), 0), axis=1)
            loads.append(load)
        return logits

    router.call = observed


def _observed(compute: experts.Compute) -> experts.Compute:
    def observed(x_BTD: jax.Array, choice: experts.Choice, kernels: experts.Kernels) -> jax.Array:
        measures, loads = _KEPT.get()
        if measures:
            loads.append({COUNTS: _counts_BE(choice.experts_BTK, kernels.experts)})
        return compute(x_BTD, choice, kernels)

    return observed


def _counts_BE(chosen_BTK: jax.Array, count: int) -> jax.Array:
    """Count the real tokens of each row that are sent to each expert, float32."""
    has_BTE = jnp.any(chosen_BTK[..., None] == jnp.arange(count), axis=-2)
    real_BT1 = experts.real_tokens(chosen_BTK.shape[:2])[..., None]
    return jnp.sum((has_BTE & real_BT1).astype(jnp.float32), axis=1)
