"""The training step: one jitted function with explicit shardings, pure in its arrays.

    state  = {"params": adapter factors, or all weights, "opt": optimizer state, "step": int32}     donated
    frozen = the base's arrays, none where all weights are trained                  never donated or updated
    batch  = {"token_ids", "segment_ids" (B, T) int32, "target_positions", "target_ids" (B, K) int32,
              "target_weights" (B, K) float32}                            see kithara_ray.sft.batches.collate

The loss is the mean over the unmasked tokens of the *global* batch, so a host's rows count by their tokens.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kithara_ray.model.causal_lm import CausalLM, Frozen, Params
from kithara_ray.sharding.mesh import BATCH_AXES, batch_sharding, replicated
from kithara_ray.train.loss import summed_cross_entropy
from kithara_ray.train.optimizer import Optimizer

State = dict[str, Any]
Batch = dict[str, jax.Array]
AbstractBatch = Mapping[str, jax.Array | jax.ShapeDtypeStruct]  # shapes, to compile for


def summed_loss(
    model: CausalLM, params: Params, frozen: Frozen, batch: Batch, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute (sum of weighted cross-entropy, sum of weights): float32 scalars over the global batch."""
    hidden_BTD = model.hidden_BTD(params, frozen, batch["token_ids"], batch["segment_ids"], dropout_key)
    hidden_BKD = jnp.take_along_axis(hidden_BTD, batch["target_positions"][..., None], axis=1)
    head = model.head_weights(params, frozen)
    trained, fixed = (head, []) if model.trains_head else ([], head)
    total = summed_cross_entropy(
        lambda trained, hidden: model.head_V(trained or fixed, hidden),
        trained,
        hidden_BKD,
        batch["target_ids"],
        batch["target_weights"],
        model.vocabulary,
        model.mesh.size,
    )
    return total, jnp.sum(batch["target_weights"])


def loss_and_gradients(
    model: CausalLM, params: Params, frozen: Frozen, batch: Batch, dropout_key=None, micro_batches: int = 1
) -> tuple[jax.Array, Params]:
    """Compute the mean loss over the batch's unmasked tokens, float32, and its gradients in the parameters' dtypes.

    With `micro_batches`, the rows pass through the model in that many parts, one after the other. Each part is divided
    by the token count of the whole batch. The parts therefore add up to the full batch's result, however their tokens
    are spread.
    """
    weight = jnp.maximum(jnp.sum(batch["target_weights"]), 1.0)

    def of(part: Batch, key):
        return jax.value_and_grad(lambda params: summed_loss(model, params, frozen, part, key)[0] / weight)(params)

    if micro_batches == 1:
        return of(batch, dropout_key)

    def add(total, part):
        return jax.tree.map(jnp.add, total, of(*part)), None

    # Accumulate in float32, whatever the parameters' dtypes are.
    zeros = jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)
    keys = None if dropout_key is None else jax.random.split(dropout_key, micro_batches)
    parts = jax.tree.map(partial(_micro_batches, model, micro_batches), batch)
    loss, grads = jax.lax.scan(add, zeros, (parts, keys))[0]
    return loss, jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params)


def _micro_batches(model: CausalLM, parts: int, array_BX: jax.Array) -> jax.Array:
    """Split into (parts, B / parts, ...): each part takes rows of every device, so no row moves."""
    rows, *rest = array_BX.shape
    split = jnp.swapaxes(array_BX.reshape(rows // parts, parts, *rest), 0, 1)
    return jax.lax.with_sharding_constraint(split, NamedSharding(model.mesh, PartitionSpec(None, BATCH_AXES)))


def train_step(
    model: CausalLM,
    optimizer: Optimizer,
    state: State,
    frozen: Frozen,
    batch: Batch,
    micro_batches: int = 1,
    seed: int = 0,
    skip_nonfinite: bool = False,
):
    """Compute (new state, {"loss", "learning_rate", "grad_norm"}), the latter float32 scalars.

    The dropout mask is a function of `seed` and the step. With `skip_nonfinite`, a step whose loss or gradient is not
    finite changes neither the parameters nor the optimizer's state.
    """
    key = jax.random.fold_in(jax.random.key(seed), state["step"]) if model.dropout else None
    loss, grads = loss_and_gradients(model, state["params"], frozen, batch, key, micro_batches)
    params, opt = optimizer.update(grads, state["opt"], state["params"])
    squares = sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))
    if skip_nonfinite:
        finite = jnp.isfinite(loss) & jnp.isfinite(squares)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        params, opt = keep(params, state["params"]), keep(opt, state["opt"])
    metrics = {
        "loss": loss,
        "learning_rate": optimizer.learning_rate(state["opt"]),
        "grad_norm": jnp.sqrt(squares),
    }
    return {"params": params, "opt": opt, "step": state["step"] + 1}, metrics


def initial_state(model: CausalLM, optimizer: Optimizer, params: Params) -> State:
    """The state at step 0: the given parameters and the optimizer's first state, created where it lives.

    An optimizer array with a parameter's shape is split as that parameter is; any other is replicated.
    """

    def make(params):
        return {"opt": optimizer.init(params), "step": jnp.int32(0)}

    shardings = _state_shardings(model, jax.eval_shape(make, params))
    return {"params": params} | jax.jit(make, out_shardings=shardings)(params)


def abstract_state(model: CausalLM, optimizer: Optimizer) -> State:
    """The shapes and shardings of `initial_state`, without values, to compile ahead of time."""
    params = model.abstract_params()

    def make():
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in params.items()}
        return {"opt": optimizer.init(zeros), "step": jnp.int32(0)}

    shapes = jax.eval_shape(make)
    with_shardings = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        _state_shardings(model, shapes),
    )
    return {"params": params} | with_shardings


def abstract_batch(model: CausalLM, rows: int, seq_len: int, predictions: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch with this many rows over all devices."""
    widths = {"token_ids": seq_len, "segment_ids": seq_len}
    widths |= dict.fromkeys(("target_positions", "target_ids", "target_weights"), predictions)
    return {
        name: jax.ShapeDtypeStruct(
            (rows, width), jnp.float32 if name == "target_weights" else jnp.int32, sharding=batch_sharding(model.mesh)
        )
        for name, width in widths.items()
    }


def _state_shardings(model: CausalLM, shapes: State) -> State:
    split = {leaf.shape: leaf.sharding for leaf in model.abstract_params().values()}
    return jax.tree.map(lambda leaf: split.get(leaf.shape, replicated(model.mesh)), shapes)


def compile_step(
    model: CausalLM,
    optimizer: Optimizer,
    state: State,
    frozen: Frozen,
    batch: AbstractBatch,
    micro_batches: int = 1,
    seed: int = 0,
    skip_nonfinite: bool = False,
) -> Callable[[State, Frozen, Batch], tuple[State, dict[str, jax.Array]]]:
    """Compile the step for these arrays' shapes and shardings. Its state argument is donated."""

    def step(state, frozen, batch):
        return train_step(model, optimizer, state, frozen, batch, micro_batches, seed, skip_nonfinite)

    state_in = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(
        step,
        in_shardings=(state_in, jax.tree.map(lambda leaf: leaf.sharding, frozen), batch_sharding(model.mesh)),
        out_shardings=(state_in, replicated(model.mesh)),
        donate_argnums=0,
    )
    return jitted.lower(state, frozen, batch).compile()


def compile_eval(
    model: CausalLM, params: Params, frozen: Frozen, batch: AbstractBatch
) -> Callable[[Params, Frozen, Batch], tuple[jax.Array, jax.Array]]:
    """Compile the evaluation step: (summed loss, summed weight) of one batch."""

    def evaluate(params, frozen, batch):
        return summed_loss(model, params, frozen, batch)

    return jax.jit(evaluate, out_shardings=replicated(model.mesh)).lower(params, frozen, batch).compile()
