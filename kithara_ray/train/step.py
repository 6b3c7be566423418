"""The training step: one jitted function with explicit shardings, pure in its arrays.

    state  = {"params": adapter factors, or all weights, "opt": optimizer state, "step": int32}     donated
    frozen = the base's arrays, none where all weights are trained                  never donated or updated
    batch  = {"token_ids", "segment_ids" (B, T) int32, "target_positions", "target_ids" (B, K) int32,
              "target_weights" (B, K) float32}                            see kithara_ray.sft.batches.collate

The loss is the mean over the unmasked tokens of the *global* batch, so a host's rows count by their tokens. A mixture
of experts may add its routers' auxiliary loss: that of a micro-batch over all hosts, weighed by its share of the
global batch's real tokens. Without gradient accumulation this is the loss of the whole batch. The loss that is
reported leaves it out.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kithara_ray.model.blocks import balance
from kithara_ray.model.causal_lm import CausalLM, Frozen, Params
from kithara_ray.sharding.mesh import BATCH_AXES, batch_sharding, replicated
from kithara_ray.train.loss import summed_cross_entropy
from kithara_ray.train.optimizer import Optimizer

State = dict[str, Any]
Batch = dict[str, jax.Array]
# Name of the routers' auxiliary loss beside the measures of the experts' load.
AUX = "aux"
AbstractBatch = Mapping[str, jax.Array | jax.ShapeDtypeStruct]  # shapes, to compile for


def summed_loss(
    model: CausalLM, params: Params, frozen: Frozen, batch: Batch, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute (sum of weighted cross-entropy, sum of weights): float32 scalars over the global batch."""
    total, weight, _ = _summed(model, params, frozen, batch, dropout_key, ())
    return total, weight


def _summed(
    model: CausalLM, params: Params, frozen: Frozen, batch: Batch, dropout_key, measures: Collection[str]
) -> tuple[jax.Array, jax.Array, balance.Load]:
    """The same, and these measures of the experts' load, (L, E) over the global batch."""
    tokens = batch["token_ids"], batch["segment_ids"]
    hidden_BTD, load_LBE = model.measured(params, frozen, *tokens, dropout_key, measures)
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
    return total, jnp.sum(batch["target_weights"]), jax.tree.map(lambda array: jnp.sum(array, axis=1), load_LBE)


def loss_and_gradients(
    model: CausalLM, params: Params, frozen: Frozen, batch: Batch, dropout_key=None, micro_batches: int = 1
) -> tuple[jax.Array, Params]:
    """Compute the mean loss over the batch's unmasked tokens, float32, and its gradients in the parameters' dtypes.

    With `micro_batches`, the rows pass through the model in that many parts, one after the other. Each part is divided
    by the token count of the whole batch. The parts therefore add up to the full batch's result, however their tokens
    are spread.
    """
    loss, _, grads = losses_and_gradients(model, params, frozen, batch, dropout_key, micro_batches)
    return loss, grads


def losses_and_gradients(
    model: CausalLM, params: Params, frozen: Frozen, batch: Batch, dropout_key=None, micro_batches: int = 1
) -> tuple[jax.Array, dict[str, jax.Array], Params]:
    """Compute the same, and what a mixture of experts tells; gradients are those of the loss with the auxiliary loss.

    Returns:
        the loss without the auxiliary loss, {"counts": (L, E), the tokens of each expert in each mixture; "aux": the
        routers' auxiliary loss, if the model's options ask for it}, and the gradients.
    """
    weight = jnp.maximum(jnp.sum(batch["target_weights"]), 1.0)
    real = jnp.maximum(_real_tokens(batch), 1)
    aux_coef = model.options.router_aux_loss_coef
    measures = {balance.COUNTS, *([balance.PROBABILITIES] if aux_coef else [])}

    def losses(params: Params, part: Batch, key):
        total, _, load = _summed(model, params, frozen, part, key, measures)
        loss = total / weight
        told = {name: load[name] for name in (balance.COUNTS,) if name in load}
        if not aux_coef:
            return loss, (loss, told)
        tokens = _real_tokens(part)
        aux = balance.auxiliary_loss(load, tokens) * (tokens / real)
        return loss + aux_coef * aux, (loss, told | {AUX: aux})

    def of(part: Batch, key):
        (_, (loss, told)), grads = jax.value_and_grad(losses, has_aux=True)(params, part, key)
        return (loss, grads), told

    if micro_batches == 1:
        (loss, grads), told = of(batch, dropout_key)
        return loss, told, grads

    def add(total, part):
        made, told = of(*part)
        return jax.tree.map(jnp.add, total, made), told

    # Accumulate in float32, whatever the parameters' dtypes are.
    zeros = jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)
    keys = None if dropout_key is None else jax.random.split(dropout_key, micro_batches)
    parts = jax.tree.map(partial(_micro_batches, model, micro_batches), batch)
    (loss, grads), told = jax.lax.scan(add, zeros, (parts, keys))
    told = jax.tree.map(lambda array: jnp.sum(array, axis=0), told)
    return loss, told, jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params)


def _real_tokens(batch: Batch) -> jax.Array:
    """Number of tokens of the batch that are no padding."""
    return jnp.sum(batch["segment_ids"] != 0)


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

    A mixture of experts adds "expert_load", (L,), see `balance.fullest`, and "router_aux_loss" if it is trained on.

    The dropout mask is a function of `seed` and the step. With `skip_nonfinite`, a step whose loss or gradient is not
    finite changes neither the parameters nor the optimizer's state.
    """
    key = jax.random.fold_in(jax.random.key(seed), state["step"]) if model.dropout else None
    loss, told, grads = losses_and_gradients(model, state["params"], frozen, batch, key, micro_batches)
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
    if balance.COUNTS in told:
        metrics["expert_load"] = balance.fullest(told[balance.COUNTS])
    if AUX in told:
        metrics["router_aux_loss"] = told[AUX]
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
