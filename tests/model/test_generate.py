"""Decoding on sharded weights: whatever the mesh, transformers' greedy tokens; no device holds a whole weight."""

import jax
import numpy as np
import pytest
import torch
from tiny import UNEVEN, VOCABULARY, write_model
from transformers import AutoModelForCausalLM

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model import generate
from kithara_ray.model.causal_lm import build
from kithara_ray.model.generate import decoder_of
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
    ours = decoder_of(model, {}, model.load(base)).greedy(PROMPTS, 24, (2,))
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
    ours = decoder_of(model, {}, frozen).greedy(PROMPTS, 24, (2,))
    reference = AutoModelForCausalLM.from_pretrained(directory).eval()
    for prompt, row in zip(PROMPTS, ours, strict=True):
        assert row == reference.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_length=24)[0].tolist()


@pytest.mark.parametrize("rows", [4, 2])
def test_a_row_that_has_ended_gives_its_place_to_the_next_prompt(rows, tiny_models, monkeypatch):
    """Seven prompts on fewer rows, two computed at a time, ended by stop tokens or by the length."""
    monkeypatch.setattr(generate, "_ROWS", rows)
    monkeypatch.setattr(generate, "_PROMPTS", 2)
    base = BaseCheckpoint.open(tiny_models["llama"])
    model = build(base.config, None, make_mesh(MeshShape(), jax.devices()[:1]), "float32", scan=False)
    decoder = decoder_of(model, {}, model.load(base))
    prompts = [RNG.integers(3, VOCABULARY, length).tolist() for length in (13, 9, 5, 21, 2, 17, 8)]
    reference = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()
    free = [reference.generate(torch.tensor([p]), do_sample=False, max_length=24)[0].tolist() for p in prompts]
    stops = (free[0][15], free[2][6])
    wanted = [cut(row, len(prompt), stops) for row, prompt in zip(free, prompts, strict=True)]
    assert len({len(row) - len(prompt) for row, prompt in zip(wanted, prompts, strict=True)}) > 3
    assert decoder.greedy(prompts, 24, stops) == wanted
    # Prompts of up to 8, 16 and 24 tokens, and the one token of a step.
    assert [block._cache_size() for block in decoder.programs.blocks] == [4]


def cut(row: list[int], prompt: int, stops: tuple[int, ...]) -> list[int]:
    ends = [place + 1 for place in range(prompt, len(row)) if row[place] in stops]
    return row[: min(ends, default=len(row))]


def test_tokens_come_as_they_are_decoded(tiny_models):
    base = BaseCheckpoint.open(tiny_models["llama"])
    model = build(base.config, None, make_mesh(MeshShape(), jax.devices()[:1]), "float32", scan=False)
    decoder = decoder_of(model, {}, model.load(base))
    calls, step = [], decoder.programs.step
    decoder.programs.step = lambda *args: calls.append(1) or step(*args)
    tokens = [(len(calls), number, token) for number, token in decoder.stream(PROMPTS[:1], 24, ())]
    assert [token for *_, token in tokens] == decoder.greedy(PROMPTS[:1], 24, ())[0][13:]
    # The host is at most two steps ahead of what it has read.
    assert [begun for begun, *_ in tokens] == [min(read + 2, 10) for read in range(11)]


def test_weights_stay_in_place_and_the_cache_is_split_by_rows_and_heads(tmp_path):
    """In the compiled programs: no weight is as large as it is whole, and a device's cache has its rows and heads."""
    directory = write_model(tmp_path / "model", "llama", hidden_size=192, intermediate_size=256, num_hidden_layers=2)
    base = BaseCheckpoint.open(directory)
    model = build(base.config, None, make_mesh(MeshShape(fsdp=2, tensor=2)), "float32", scan=False)
    decoder = decoder_of(model, {}, model.load(base))
    texts = []
    for name in ("_enter", "_leave"):
        watch(decoder.programs, name, texts)
    block_of = decoder.programs._block_of
    for number in range(len(block_of)):
        watch(block_of, number, texts)
    decoder.greedy(PROMPTS, 30, (2,))
    whole = {tuple(slot.shape) for slot in model.slots if np.prod(slot.shape) > 2048}
    assert len(whole) >= 6
    for text in texts:
        for shape in whole:
            assert f"f32[{','.join(map(str, shape))}]" not in text, shape
    # (rows, heads, positions, width): 4 rows over 2, 2 key heads over 2.
    assert any("f32[2,1,32,32]" in text for text in texts)
    assert not any("f32[4,2,32,32]" in text for text in texts)


def watch(holder, name, texts: list[str]) -> None:
    """Note the compiled text of each of a program's calls."""
    program = getattr(holder, name) if isinstance(name, str) else holder[name]

    def call(*args, **kwargs):
        texts.append(program.lower(*args, **kwargs).compile().as_text())
        return program(*args, **kwargs)

    if isinstance(name, str):
        setattr(holder, name, call)
    else:
        holder[name] = call
