"""Experts in one tensor, as published, are those one by one, as transformers saves them."""

import json

import numpy as np
import pytest

from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.facts import stored
from kithara_ray.hf.safetensors_file import write_arrays

EXPERTS, INNER, WIDTH = 3, 4, 5
MLP = "model.layers.0.mlp"


@pytest.fixture
def both(tmp_path):
    """The checkpoint with each expert's tensors, and the one with those of all experts."""
    rng = np.random.default_rng(0)
    gate_up, down = (
        rng.normal(size=(EXPERTS, 2 * INNER, WIDTH)).astype(np.float32),
        rng.normal(size=(EXPERTS, WIDTH, INNER)).astype(np.float32),
    )
    apart = {f"{MLP}.gate.weight": np.ones((EXPERTS, WIDTH), np.float32)}
    for e in range(EXPERTS):
        parts = dict(gate_proj=gate_up[e, :INNER], up_proj=gate_up[e, INNER:], down_proj=down[e])
        apart |= {f"{MLP}.experts.{e}.{name}.weight": np.ascontiguousarray(array) for name, array in parts.items()}
    whole = {f"{MLP}.gate.weight": apart[f"{MLP}.gate.weight"]}
    whole |= {f"{MLP}.experts.gate_up_proj": gate_up, f"{MLP}.experts.down_proj": down}
    opened = []
    for name, tensors in (("apart", apart), ("whole", whole)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({}))
        write_arrays(tmp_path / name / "model.safetensors", tensors, {})
        opened.append(BaseCheckpoint.open(tmp_path / name))
    return opened


def test_an_expert_is_read_out_of_the_tensor_of_all(both):
    apart, whole = both
    for name in apart.names:
        assert stored.shape_of(whole, name) == apart.info(name).shape
        np.testing.assert_array_equal(stored.view(whole, name), apart.view(name))
        np.testing.assert_array_equal(stored.view(apart, name), apart.view(name))
    assert {each for name in apart.names for each in stored.names_of(whole, name)} == set(whole.names)


def test_an_expert_too_many_is_missed(both):
    _, whole = both
    assert stored.shape_of(whole, f"{MLP}.experts.{EXPERTS}.up_proj.weight") == ()
    assert stored.names_of(whole, "model.layers.1.mlp.experts.0.up_proj.weight") == (
        "model.layers.1.mlp.experts.0.up_proj.weight",
    )
