"""All weights trained: gradients against transformers' autograd, one step against torch's AdamW."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch
from tiny import UNEVEN, VOCABULARY, mostly_long, write_model
from transformers import AutoModelForCausalLM

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.causal_lm import build
from kithara_ray.model.weights.layout import local_slices
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.train import step
from kithara_ray.train.optimizer import KerasOptimizer, OptaxOptimizer

B, T = 4, 24
RNG = np.random.default_rng(5)
TOKENS = RNG.integers(3, VOCABULARY, (B, T)).astype(np.int32)
WEIGHTS = (RNG.random((B, T - 1)) < 0.6).astype(np.float32)


def batch(mesh):
    arrays = {
        "token_ids": TOKENS,
        "segment_ids": np.ones((B, T), np.int32),
        "target_positions": np.tile(np.arange(T - 1), (B, 1)).astype(np.int32),
        "target_ids": TOKENS[:, 1:],
        "target_weights": WEIGHTS,
    }
    return {name: jax.device_put(array, batch_sharding(mesh)) for name, array in arrays.items()}


def start(directory, precision="float32", mesh=None, **options):
    """(base, model, params, batch)."""
    base, mesh = BaseCheckpoint.open(directory), make_mesh(mesh)
    model = build(base.config, None, mesh, precision, train_weights=True, **options)
    return base, model, model.as_params(model.load(base)), batch(mesh)


def by_name(base, model, params):
    """HF tensors by name, put together from slices of at most 4 KB."""
    whole = {}
    arrays = [params[slot.key] for slot in model.slots]
    for part in local_slices(base, model.slots, arrays, 0, slice_bytes=4096):
        assert part.data.nbytes <= 4096
        tensor = whole.setdefault(part.name, np.full(part.shape, np.nan, np.float32))
        region = tuple(slice(*bounds) for bounds in part.bounds)
        assert np.isnan(tensor[region]).all(), part.name
        tensor[region] = part.data
    return {name: tensor.reshape(base.tensors[name].shape) for name, tensor in whole.items()}


def reference_loss(model):
    logits = model(torch.tensor(TOKENS).long()).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), torch.tensor(TOKENS[:, 1:]).long().reshape(-1), reduction="none"
    )
    return (each * torch.tensor(WEIGHTS).reshape(-1)).sum() / WEIGHTS.sum()


def reference(directory):
    """(model in training, its loss, gradients by name)."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").train()
    loss = reference_loss(model)
    loss.backward()
    return model, loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def assert_close(ours, theirs, relative):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert np.linalg.norm(tensor) > 0, name
        assert np.linalg.norm(ours[name] - tensor) < relative * np.linalg.norm(tensor), name


MODELS = {
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {}),
    "qwen2 with biases and a head of its own": ("qwen2", dict(tie_word_embeddings=False)),
    "dims that four devices do not divide": ("llama", UNEVEN),
}
WAYS = {
    "llama": [dict(mesh=MeshShape(fsdp=2, tensor=2), remat="dots")],
    "gemma2": [dict(), dict(mesh=MeshShape(data=2), stack_factors=False)],
    "dims that four devices do not divide": [dict(), dict(mesh=MeshShape(fsdp=2, tensor=2), stack_factors=False)],
}


@pytest.mark.parametrize("case", mostly_long(["llama"], MODELS))
def test_gradients_of_all_parameters_are_those_of_transformers(case, tmp_path, monkeypatch):
    # Blocks in three chunks, but under "dots".
    monkeypatch.setattr("kithara_ray.model.options._CHUNK_TOKENS", 8)
    family, fields = MODELS[case]
    directory = write_model(tmp_path / "model", family, **fields)
    _, expected, theirs = reference(directory)
    for options in WAYS.get(case, [dict()]):
        base, model, params, data = start(directory, **options)
        loss, grads = jax.jit(lambda p, d, m=model: step.loss_and_gradients(m, p, [], d))(params, data)
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        assert_close(by_name(base, model, grads), theirs, 1e-4)


def trained(directory, optimizer, steps=1, micro_batches=1, **options):
    """(tensors by name, history) after so many steps."""
    base, model, params, data = start(directory, **options)
    state = step.initial_state(model, optimizer, params)
    compiled = step.compile_step(model, optimizer, state, [], data, micro_batches)
    history = []
    for _ in range(steps):
        state, metrics = compiled(state, [], data)
        history.append(float(metrics["loss"]))
    return by_name(base, model, state["params"]), history, state, compiled


def keras_optimizer(optimizer):
    return KerasOptimizer(keras.optimizers.serialize(optimizer))


EPSILON = 1e-3


@pytest.mark.parametrize(("family", "micro_batches"), [("llama", 1), ("gemma2", 2)])
def test_an_adamw_step_is_torch_s(family, micro_batches, tiny_models):
    """Weight decay on every parameter, as both do. Keras adds its epsilon before the second moment's correction."""
    model, _, _ = reference(tiny_models[family])
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    beta = 0.95
    torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, beta), weight_decay=0.1, eps=EPSILON / np.sqrt(1 - beta)
    ).step()
    optimizer = keras.optimizers.AdamW(1e-2, weight_decay=0.1, beta_2=beta, epsilon=EPSILON)
    mesh = MeshShape(fsdp=2, tensor=2)
    ours, _, _, _ = trained(tiny_models[family], keras_optimizer(optimizer), mesh=mesh, micro_batches=micro_batches)
    theirs = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert_close({n: ours[n] - before[n] for n in ours}, {n: theirs[n] - before[n] for n in theirs}, 1e-3)


def test_an_optimizer_that_sees_whole_tensors(tiny_models):
    """clipnorm and optax get every tensor by itself; both against torch, tensor by tensor."""
    directory = tiny_models["gemma2"]
    model, _, grads = reference(directory)
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    expected = {n: before[n] - g / max(1.0, np.linalg.norm(g) / 1e-3) for n, g in grads.items()}
    optimizers = {
        "keras": keras_optimizer(keras.optimizers.SGD(1.0, clipnorm=1e-3)),
        "optax": OptaxOptimizer(optax.chain(optax.adaptive_grad_clip(1e9), optax.sgd(1.0))),
    }
    ours, _, _, _ = trained(directory, optimizers["keras"], stack_factors=False)
    assert_close({n: ours[n] - before[n] for n in ours}, {n: e - before[n] for n, e in expected.items()}, 1e-3)


def dtypes(state):
    return {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim}


def test_weights_and_optimizer_state_are_float32_under_mixed_precision(tiny_models, tmp_path):
    """Updates smaller than a bfloat16's last bit add up."""
    directory = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).to(torch.bfloat16).save_pretrained(directory)
    adam = keras_optimizer(keras.optimizers.Adam(1e-5))
    ours, history, state, _ = trained(directory, adam, 3, precision="mixed_bfloat16")
    assert dtypes(state) == {np.dtype(np.float32)}
    with torch.no_grad():
        expected = reference_loss(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)).item()
    assert history[0] == pytest.approx(expected, rel=0.02)
    base = BaseCheckpoint.open(directory)
    moved = [np.abs(ours[n] - base.view(n).astype(np.float32)).mean() for n in ours if "proj" in n]
    assert min(moved) == pytest.approx(3e-5, rel=0.2)


def test_bfloat16_is_bfloat16(tiny_models):
    _, model, params, _ = start(tiny_models["llama"], precision="bfloat16")
    state = step.abstract_state(model, keras_optimizer(keras.optimizers.Adam(1e-5)))
    assert dtypes(state) == dtypes(params) == {np.dtype(jnp.bfloat16)}


def test_no_device_holds_a_whole_gradient_or_weight_of_all_blocks(tmp_path):
    """The program's largest arrays: stacked weights, their gradients and moments stay split four ways."""
    directory = write_model(tmp_path / "model", "llama", num_hidden_layers=8, hidden_size=192)
    _, _, state, compiled = trained(directory, keras_optimizer(keras.optimizers.AdamW(1e-3)))
    stacked = 8 * 192 * 128
    text = compiled.as_text()
    assert f"f32[8,192,{128 // 4}]" in text or f"f32[8,{192 // 4},128]" in text
    for whole in ("f32[8,192,128]", "f32[8,128,192]", "f32[320,192]", "f32[192,320]"):
        assert whole not in text, whole
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(state["params"]))
    assert stacked * 4 < params
    # Parameters, two moments, gradients: four quarters; and what is computed with.
    assert compiled.memory_analysis().temp_size_in_bytes < params
