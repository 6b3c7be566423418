"""What each precision stores, computes and trains in."""

import jax
import jax.numpy as jnp
import keras
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout, export
from kithara_ray.model.causal_lm import build
from kithara_ray.model.options import PRECISIONS
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.train import step
from kithara_ray.train.optimizer import KerasOptimizer

LORA = LoraConfig(r=4, lora_alpha=12, use_dora=True)
STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def bases(tiny_models, tmp_path_factory):
    """The same llama in two dtypes."""
    half = tmp_path_factory.mktemp("bfloat16")
    AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.bfloat16).save_pretrained(half)
    return {"float32": BaseCheckpoint.open(tiny_models["llama"]), "bfloat16": BaseCheckpoint.open(half)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stored", STORED)
def test_dtypes(precision, stored, bases):
    """The frozen base keeps the checkpoint's dtype, but for "bfloat16"; all that is trained is float32."""
    base, optimizer = bases[stored], KerasOptimizer(keras.optimizers.serialize(keras.optimizers.AdamW(1e-3)))
    model = build(base.config, LORA, make_mesh(), precision)
    frozen = model.load(base)
    held = ml_dtypes.bfloat16 if precision == "bfloat16" else STORED[stored]
    assert {array.dtype for array in frozen} == {np.dtype(held)}

    state = step.abstract_state(model, optimizer)
    batch = step.abstract_batch(model, 4, 16, 8)

    def trained(state, frozen, batch):
        after, metrics = step.train_step(model, optimizer, state, frozen, batch)
        hidden = model.hidden_BTD(state["params"], frozen, batch["token_ids"], batch["segment_ids"])
        return after, metrics, hidden

    after, metrics, hidden = jax.eval_shape(trained, state, frozen, batch)
    float32 = {leaf.dtype for leaf in jax.tree.leaves((after, metrics)) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert float32 == {np.dtype(np.float32)}
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert hidden.dtype == (np.float32 if precision == "float32" else ml_dtypes.bfloat16)
    first = model.initial_factors(0, frozen)
    assert {array.dtype for array in first.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("stored", STORED)
def test_exports_keep_the_base_s_dtype_and_the_factors_theirs(stored, bases, tmp_path):
    base, rng = bases[stored], np.random.default_rng(0)
    model = build(base.config, LORA, make_mesh(), "mixed_bfloat16")
    tensors = {name: rng.uniform(0.5, 1, shape).astype(np.float32) for name, shape in model.adapter_shapes.items()}
    for layout in (Layout.MERGED, Layout.SEPARATE):
        export(base, Adapter(LORA, tensors), str(tmp_path / layout), layout, base_name="base")
        written = BaseCheckpoint.open(tmp_path / layout)
        assert {info.dtype for info in written.tensors.values()} == {"F32" if stored == "float32" else "BF16"}
        assert written.config["dtype"] == stored
    assert {t.dtype for t in Adapter.read(tmp_path / "separate" / "adapter").tensors.values()} == {np.dtype("f4")}
