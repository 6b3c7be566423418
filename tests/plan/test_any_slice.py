"""A run on any number of chips is planned: shapes that few of them divide, from 4 chips to 256, by estimate."""

import pytest
from shapes import SHAPES

from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.model.options import ModelOptions
from kithara_ray.plan import lines, slice_of
from kithara_ray.plan.planner import Rows, checked, facts_of_all, request_of
from kithara_ray.plan.report import assemble
from kithara_ray.sharding.shape import MeshShape

SLICES = [slice_of(f"v5e-{chips}") for chips in (4, 8, 16, 32, 64, 128, 256)]


@pytest.mark.long
def test_every_shape_on_every_number_of_chips():
    """One process builds all of them. No chip holds more than four shares of the weights: gpt-oss' 2,880 has 2^6."""
    points = [(name, where) for name in SHAPES for where in SLICES]
    split, row = MeshShape(), Rows(128, 1, 1, None)
    requests = [
        request_of(SHAPES[name], where, row, LoraConfig(r=4), None, split, ModelOptions())
        | {"compile": False, "topology": None}
        for name, where in points
    ]
    asked = [(request, where) for request, (_, where) in zip(requests, points, strict=True)]
    found = facts_of_all(asked, cache=False, timeout_s=600)
    plans = {
        (name, where.chips): assemble(request, where, checked(facts), "estimated")
        for (name, where), request, facts in zip(points, requests, found, strict=True)
    }
    for (name, chips), facts in zip(plans, found, strict=True):
        made = plans[name, chips]
        share = facts["frozen_bytes"] // chips
        assert made.mesh == {"data": 1, "fsdp": chips, "tensor": 1}
        assert share <= made.hbm_bytes_per_chip["frozen"] <= 4 * share, (name, chips)
    # Qwen2.5-7B's queries have biases of (28, 128): 256 chips hold them in 128 parts, each twice; 2 blocks, 2 bytes.
    assert plans["Qwen2.5-7B", 256].uneven_bytes == 2 * 28 * 128 * 2 // 256
    assert any(name == "    copies, there" for name, _ in lines.rows(plans["Qwen2.5-7B", 256]))
    assert plans["Qwen2.5-7B", 128].uneven_bytes == 0
