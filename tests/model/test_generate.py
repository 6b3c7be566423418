"""Decoding on sharded weights: whatever the mesh, transformers' greedy tokens; no device holds a whole weight."""

import numpy as np
import pytest
import torch
from tiny import UNEVEN, VOCABULARY, write_model
from transformers import AutoModelForCausalLM

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.causal_lm import build
from kithara_ray.model.generate import Decoder
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.sharding.shape import MeshShape

RNG = np.random.default_rng(0)
# Three prompts of three lengths: no mesh of four devices that splits rows divides them.
PROMPTS = [RNG.integers(3, VOCABULARY, length).tolist() for length in (13, 9, 5)]


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("gemma2", MeshShape()),
        pytest.param("llama", MeshShape(fsdp=2, tensor=2), marks=pytest.mark.long),
        ("llama", MeshShape(data=2, fsdp=1, tensor=2)),
    ],
)
def test_rows_that_the_mesh_does_not_divide(family, mesh, tiny_models):
    directory = tiny_models[family]
    base = BaseCheckpoint.open(directory)
    model = build(base.config, None, make_mesh(mesh), "float32", scan=False)
    ours = Decoder(model, {}, model.load(base)).greedy(PROMPTS, 24, (2,))
    reference = AutoModelForCausalLM.from_pretrained(directory).eval()
    for prompt, row in zip(PROMPTS, ours, strict=True):
        wanted = reference.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_length=24)
        assert row == wanted[0].tolist()
    assert len({tuple(row[-5:]) for row in ours}) > 1


@pytest.mark.long
@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(fsdp=2, tensor=2)])
def test_weights_that_the_mesh_does_not_divide(mesh, tmp_path):
    directory = write_model(tmp_path / "model", "llama", **UNEVEN)
    base = BaseCheckpoint.open(directory)
    model = build(base.config, None, make_mesh(mesh), "float32", scan=False)
    frozen = model.load(base)
    assert any("copies" in array.sharding.mesh.shape for array in frozen)
    ours = Decoder(model, {}, frozen).greedy(PROMPTS, 24, (2,))
    reference = AutoModelForCausalLM.from_pretrained(directory).eval()
    for prompt, row in zip(PROMPTS, ours, strict=True):
        assert row == reference.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_length=24)[0].tolist()


def test_weights_stay_in_place_and_the_cache_is_split_by_rows_and_heads(tmp_path):
    """In the compiled program: no weight is as large as it is whole, and a device's cache has its rows and heads."""
    directory = write_model(tmp_path / "model", "llama", hidden_size=192, intermediate_size=256, num_hidden_layers=2)
    base = BaseCheckpoint.open(directory)
    model = build(base.config, None, make_mesh(MeshShape(fsdp=2, tensor=2)), "float32", scan=False)
    frozen = model.load(base)
    decoder = Decoder(model, {}, frozen)
    text = decoder.step.lower({}, frozen, *decoder.batch(PROMPTS, 30), (2,)).compile().as_text()
    whole = {tuple(slot.shape) for slot in model.slots if np.prod(slot.shape) > 2048}
    assert len(whole) >= 6
    for shape in whole:
        assert f"f32[{','.join(map(str, shape))}]" not in text, shape
    # (rows, blocks, keys and values, positions, heads, width): 4 rows over 2, 2 key heads over 2.
    assert "f32[2,2,2,32,1,32]" in text
    assert "f32[4,2,2,32,2,32]" not in text
