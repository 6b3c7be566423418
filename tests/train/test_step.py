"""The step against plain references: an unchunked loss, torch's AdamW, unstacked factors."""

from functools import partial

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch
from parity import assert_close_as_one
from tiny import with_mild_attention

from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.causal_lm import build
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.train import loss as loss_module
from kithara_ray.train import step
from kithara_ray.train.optimizer import KerasOptimizer, OptaxOptimizer, is_elementwise

RNG = np.random.default_rng(3)
B, T, K, V = 4, 16, 8, 320


def batch(mesh, rows=B):
    rng = np.random.default_rng(3)
    arrays = {
        "token_ids": rng.integers(3, V, (rows, T)).astype(np.int32),
        "segment_ids": np.ones((rows, T), np.int32),
        "target_positions": np.tile(np.arange(T - K - 1, T - 1), (rows, 1)).astype(np.int32),
        "target_ids": rng.integers(3, V, (rows, K)).astype(np.int32),
        "target_weights": (rng.random((rows, K)) < 0.6).astype(np.float32),
    }
    return {name: jax.device_put(array, batch_sharding(mesh)) for name, array in arrays.items()}


@pytest.mark.parametrize("form", ["_exponentials_once", "_exponentials_twice"])
@pytest.mark.parametrize("chunk_logits", [1, 4 * 320 * 2, 2**25])
def test_chunked_loss_is_the_plain_one_with_its_gradient(chunk_logits, form, monkeypatch):
    # A CPU would take the first alone.
    monkeypatch.setattr(loss_module, "_exponentials_once", getattr(loss_module, form))
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(loss_module, "_DEVICE_LOGITS", chunk_logits)
    hidden = RNG.normal(size=(B, K, 12)).astype(np.float32)
    head = RNG.normal(size=(12, V)).astype(np.float32)
    targets = RNG.integers(0, V, (B, K))
    weights = (RNG.random((B, K)) < 0.5).astype(np.float32)

    def ours(head, hidden):
        """Soft-capped, and scaled behind: its own gradient is not 1."""
        return 2 * loss_module.summed_cross_entropy(
            lambda w, h: 3 * jnp.tanh(h @ w / 3), head, hidden, jnp.asarray(targets), weights, V
        )

    value, (grad_head, grad) = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(jnp.asarray(head), jnp.asarray(hidden))
    torch_hidden, torch_head = torch.tensor(hidden, requires_grad=True), torch.tensor(head, requires_grad=True)
    logits = 3 * torch.tanh((torch_hidden @ torch_head).reshape(-1, V) / 3)
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(targets).reshape(-1), reduction="none")
    expected = 2 * (each * torch.tensor(weights).reshape(-1)).sum()
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(grad, torch_hidden.grad.numpy(), atol=2e-5)
    np.testing.assert_allclose(grad_head, torch_head.grad.numpy(), atol=2e-5)


@pytest.mark.parametrize(("family", "mesh"), [("gemma2", MeshShape()), ("llama", MeshShape(fsdp=2, tensor=2))])
def test_micro_batches_add_up_to_the_batch(family, mesh, tiny_models, tmp_path):
    """1 x 8 == 8 x 1, though the rows have different numbers of trained tokens."""
    base = BaseCheckpoint.open(with_mild_attention(tiny_models[family], tmp_path / "model"))
    mesh = make_mesh(mesh)
    model = build(base.config, LoraConfig(r=4, lora_alpha=12), mesh, "float32")
    rng = np.random.default_rng(1)
    factors = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in model.adapter_shapes.items()}
    params, frozen, data = model.place_factors(factors), model.load(base), batch(mesh, rows=8)
    compute = jax.jit(partial(step.loss_and_gradients, model), static_argnames="micro_batches")
    loss, grads = compute(params, frozen, data)
    parts = 8 // (mesh.shape["data"] * mesh.shape["fsdp"])
    part_loss, part_grads = compute(params, frozen, data, micro_batches=parts)
    assert float(part_loss) == pytest.approx(float(loss), rel=1e-6)
    assert_close_as_one(part_grads, grads)


def run(directory, optimizer, steps=3, stack_factors=True):
    base, mesh = BaseCheckpoint.open(directory), make_mesh()
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=("q_proj", "down_proj"), use_dora=True)
    model = build(base.config, lora, mesh, "float32", stack_factors=stack_factors)
    frozen = model.load(base)
    state = step.initial_state(model, optimizer, model.initial_factors(0, frozen))
    data = batch(mesh)
    compiled = step.compile_step(model, optimizer, state, frozen, data)
    before = [np.asarray(array) for array in frozen]
    history = []
    for _ in range(steps):
        state, metrics = compiled(state, frozen, data)
        history.append({name: float(value) for name, value in metrics.items()})
    assert all((np.asarray(array) == old).all() for array, old in zip(frozen, before, strict=True))
    assert int(state["step"]) == steps
    shards = model.adapter_shards(state["params"], 0)
    tensors = {name: np.full(shape, np.nan, np.float32) for name, shape in model.adapter_shapes.items()}
    for shard in shards:
        tensors[shard.name][tuple(slice(*bounds) for bounds in shard.bounds)] = shard.data
    return tensors, history


def keras_adamw(**options):
    return KerasOptimizer(keras.optimizers.serialize(keras.optimizers.AdamW(1e-2, weight_decay=0.1, **options)))


def test_stacked_factors_train_as_unstacked_ones(family, tiny_models):
    stacked, history = run(tiny_models[family], keras_adamw(global_clipnorm=0.1))
    plain, plain_history = run(tiny_models[family], keras_adamw(global_clipnorm=0.1), stack_factors=False)
    assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in plain_history], rel=1e-5)
    for name, tensor in plain.items():
        np.testing.assert_allclose(stacked[name], tensor, atol=2e-4, err_msg=name)
        assert name.endswith("lora_A.weight") or tensor.any()


def test_keras_and_optax_agree(tiny_models):
    """By momentum: Keras' Adam adds its epsilon elsewhere than optax' does."""
    serialized = keras.optimizers.serialize(keras.optimizers.SGD(1e-2, momentum=0.9))
    ours, history = run(tiny_models["llama"], KerasOptimizer(serialized))
    theirs, _ = run(tiny_models["llama"], OptaxOptimizer(optax.sgd(1e-2, momentum=0.9)))
    assert [row["learning_rate"] for row in history] == pytest.approx([1e-2] * 3)
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, atol=1e-6, err_msg=name)


def test_schedules_count_steps(tiny_models):
    schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 4, 0.0)
    config = keras.optimizers.serialize(keras.optimizers.SGD(schedule))
    _, history = run(tiny_models["llama"], KerasOptimizer(config))
    assert [row["learning_rate"] for row in history] == pytest.approx([1e-2, 7.5e-3, 5e-3])


def test_optimizers_that_see_whole_tensors_are_known():
    serialize = keras.optimizers.serialize
    assert is_elementwise("keras", serialize(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0)))
    assert not is_elementwise("keras", serialize(keras.optimizers.AdamW(1e-3, clipnorm=1.0)))
    assert not is_elementwise("keras", serialize(keras.optimizers.Lamb(1e-3)))
    assert not is_elementwise("keras", serialize(keras.optimizers.Adafactor(1e-3)))
    assert not is_elementwise("optax", optax.adamw(1e-3))


def test_a_step_that_is_not_finite_is_left_out(tiny_models):
    """A weight of infinity in one row: parameters and moments stay, and the next step goes on from them."""
    base, mesh = BaseCheckpoint.open(tiny_models["llama"]), make_mesh()
    model = build(base.config, LoraConfig(r=4), mesh, "float32")
    frozen, optimizer = model.load(base), keras_adamw()
    good = batch(mesh)
    bad = good | {"target_weights": good["target_weights"].at[0, 0].set(jnp.inf)}
    compiled = None
    for batches in ([good, bad, good], [good, good]):
        state = step.initial_state(model, optimizer, model.initial_factors(0))
        compiled = compiled or step.compile_step(model, optimizer, state, frozen, good, skip_nonfinite=True)
        losses = []
        for data in batches:
            state, metrics = compiled(state, frozen, data)
            losses.append(float(metrics["loss"]))
        arrays = jax.tree.map(np.asarray, {name: state[name] for name in ("params", "opt")})
        if len(batches) == 3:
            assert not np.isfinite(losses[1])
            skipped = arrays
    jax.tree.map(np.testing.assert_array_equal, skipped, arrays)
