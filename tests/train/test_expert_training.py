"""A run that adapts the experts of a mixture and nothing else, beside PEFT's on the same rows."""

import jax
import keras
import numpy as np
import pytest
import torch
from parity import TOKENS, factors_of
from peft import PeftModel
from tiny import load, write_model

from kithara_ray.hf.adapter import ADAPTER_WEIGHTS, Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.causal_lm import build
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.train import step
from kithara_ray.train.optimizer import KerasOptimizer

STEPS, RATE = 20, 2e-3
LORA = LoraConfig(
    r=4, lora_alpha=8, target_modules=(), target_parameters=("experts.gate_up_proj", "experts.down_proj"),
)  # fmt: skip
TRAINED = (np.random.default_rng(5).random((len(TOKENS), TOKENS.shape[1] - 1)) < 0.7).astype(np.float32)


def trained_here(base: BaseCheckpoint) -> tuple[dict, dict, list[float]]:
    """First and trained factors, and the losses, with rows and factors split."""
    mesh = make_mesh(MeshShape(data=2, fsdp=2))
    model = build(base.config, LORA, mesh, "float32", routed=True)
    positions = np.tile(np.arange(TOKENS.shape[1] - 1, dtype=np.int32), (len(TOKENS), 1))
    batch = dict(
        token_ids=TOKENS,
        segment_ids=np.ones_like(TOKENS),
        target_positions=positions,
        target_ids=TOKENS[:, 1:],
        target_weights=TRAINED,
    )
    batch = {name: jax.device_put(array, batch_sharding(mesh)) for name, array in batch.items()}
    frozen, first = model.load(base), model.initial_factors(0)
    optimizer = KerasOptimizer(keras.optimizers.serialize(keras.optimizers.AdamW(RATE, weight_decay=0.0)))
    state = step.initial_state(model, optimizer, first)
    # A device holds a part of the factors, unless these are small.
    assert [array.is_fully_replicated for array in first.values()].count(True) == 1
    before = tensors_of(model, first)
    compiled = step.compile_step(model, optimizer, state, frozen, batch)
    losses = []
    for _ in range(STEPS):
        state, metrics = compiled(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return before, tensors_of(model, state["params"]), losses


def tensors_of(model, params) -> dict[str, np.ndarray]:
    tensors = {name: np.full(shape, np.nan, np.float32) for name, shape in model.adapter_shapes.items()}
    for shard in model.adapter_shards(params, 0):
        tensors[shard.name][tuple(slice(*bounds) for bounds in shard.bounds)] = shard.data
    return tensors


def trained_by_peft(directory, adapter_directory) -> list[float]:
    model = PeftModel.from_pretrained(load(directory), adapter_directory, is_trainable=True)
    optimizer = torch.optim.AdamW(factors_of(model).values(), lr=RATE, eps=1e-7, weight_decay=0.0)
    tokens, losses = torch.tensor(TOKENS).long(), []
    for _ in range(STEPS):
        logits = model(tokens).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (each * torch.tensor(TRAINED).flatten()).sum() / TRAINED.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_experts_alone_lower_the_loss_as_in_peft_and_their_factors_come_back_to_the_bit(tmp_path):
    base = BaseCheckpoint.open(write_model(tmp_path / "base", "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[]))
    before, after, losses = trained_here(base)
    Adapter(LORA, before).write(tmp_path / "first", str(base.directory))
    wanted = trained_by_peft(base.directory, tmp_path / "first")
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(wanted, rel=1e-3)
    assert len(after) == 8
    assert all((after[name] != before[name]).mean() > 0.9 for name in after)

    Adapter(LORA, after).write(tmp_path / "trained", str(base.directory))
    PeftModel.from_pretrained(load(base.directory), tmp_path / "trained").save_pretrained(tmp_path / "again")
    written = [(tmp_path / name / ADAPTER_WEIGHTS).read_bytes() for name in ("trained", "again")]
    assert written[0] == written[1]
    back = Adapter.read(tmp_path / "again")
    assert all((back.tensors[name] == tensor).all() for name, tensor in after.items())
