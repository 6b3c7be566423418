"""First factors, and dropout. That options compute what PEFT's do: test_peft_options.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCABULARY

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.blocks.dropout import dropped, dropping
from kithara_ray.model.causal_lm import build
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape

TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (4, 20)).astype(np.int32)


def place(mesh):
    return [jax.device_put(array, batch_sharding(mesh)) for array in (TOKENS, np.ones_like(TOKENS))]


def test_gaussian_factors_have_the_deviation_of_peft_s(tiny_models):
    """1 / r, as peft.tuners.lora.layer.LoraLayer.reset_lora_parameters draws them."""
    base, config = BaseCheckpoint.open(tiny_models["llama"]), LoraConfig(r=8, init_lora_weights="gaussian")
    model = build(base.config, config, make_mesh(), "float32")
    drawn = {key: np.asarray(array) for key, array in model.initial_factors(0).items()}
    a = np.concatenate([array.ravel() for key, array in drawn.items() if "lora_A" in key])
    # 4,608 draws: four deviations of their deviation are 4 %.
    assert abs(a.std() * 8 - 1) < 0.04
    assert abs(a.mean() * 8) < 0.06
    assert not any(array.any() for key, array in drawn.items() if "lora_B" in key)


def test_dropped_elements_are_zero_and_the_mean_stays():
    x = jnp.full((200, 100), 2.0)
    with dropping(jax.random.key(0)):
        first, other = np.asarray(dropped(x, 0.25, 1)), np.asarray(dropped(x, 0.25, 2))
    assert set(np.unique(first)) == {np.float32(0), np.float32(2 / 0.75)}
    # 20,000 draws: four deviations of the share are 0.0123.
    assert abs((first == 0).mean() - 0.25) < 0.0123
    assert 0.1 < ((first == 0) & (other == 0)).mean() / 0.25 < 0.4
    assert dropped(x, 0.25, 1) is x


@pytest.mark.parametrize("scan", [True, False])
def test_dropout_touches_the_side_paths_alone_and_depends_on_the_key(scan, tiny_models):
    base, lora = BaseCheckpoint.open(tiny_models["gemma2"]), LoraConfig(r=4, lora_alpha=12, lora_dropout=0.4)

    @functools.cache
    def on(shape):
        mesh = make_mesh(shape)
        model = build(base.config, lora, mesh, "float32", scan=scan)
        return mesh, model, model.load(base), jax.jit(model.hidden_BTD)

    def hidden(key, shape=None, scale=1.0):
        mesh, model, frozen, compute = on(shape)
        rng = np.random.default_rng(1)
        tensors = {n: scale * rng.normal(0, 0.2, s).astype(np.float32) for n, s in model.adapter_shapes.items()}
        return np.asarray(compute(model.place_factors(tensors), frozen, *place(mesh), key))

    first = hidden(jax.random.key(1))
    assert np.abs(first - hidden(None)).max() > 0.01
    assert np.abs(first - hidden(jax.random.key(2))).max() > 0.01
    # The same elements are dropped however the rows are split over devices.
    np.testing.assert_allclose(first, hidden(jax.random.key(1), MeshShape(fsdp=2, tensor=2)), atol=1e-4)
    np.testing.assert_allclose(hidden(jax.random.key(1), scale=0.0), hidden(None, scale=0.0), atol=1e-5)
