import numpy as np
import pytest

from kithara_ray.errors import AdapterError
from kithara_ray.sharding.gather import Shard, assemble

A = np.arange(24, dtype=np.float32).reshape(4, 6)


def shard(rows, cols, rank, name="q.lora_A.weight"):
    return Shard(name, (rows, cols), A[slice(*rows), slice(*cols)], rank)


QUARTERS = [
    shard((0, 4), (0, 2), 0),
    shard((0, 2), (2, 6), 0),
    shard((2, 4), (2, 5), 1),
    shard((2, 4), (5, 6), 1),
]
SHAPES = {"q.lora_A.weight": (4, 6)}


def test_shards_of_any_cut_tile_the_tensor():
    assert (assemble(SHAPES, QUARTERS, 2)["q.lora_A.weight"] == A).all()


def test_a_missing_shard_names_tensor_place_and_rank():
    with pytest.raises(
        AdapterError, match=r"q\.lora_A\.weight: 2 elements are missing, the first at \(2, 5\); heard from"
    ):
        assemble(SHAPES, QUARTERS[:3], 2)
    with pytest.raises(AdapterError, match=r"q\.lora_A\.weight: 8 elements are missing.*nothing came from rank \[1\]"):
        assemble(SHAPES, QUARTERS[:2], 2)


def test_a_doubled_shard_names_both_ranks():
    doubled = [*QUARTERS, shard((2, 4), (4, 6), 7)]
    with pytest.raises(AdapterError, match=r"slice \[2:4, 4:6\] came twice, from rank 1 and rank 7"):
        assemble(SHAPES, doubled, 2)


def test_an_unknown_tensor_and_a_wrong_shape_are_errors():
    with pytest.raises(AdapterError, match=r"rank 1 sent k\.lora_A\.weight, which is no tensor"):
        assemble(SHAPES, [*QUARTERS, shard((0, 4), (0, 6), 1, name="k.lora_A.weight")], 2)
    wrong = Shard("q.lora_A.weight", ((0, 4), (0, 6)), A[:2], 0)
    with pytest.raises(AdapterError, match=r"rank 0 sent a slice \[0:4, 0:6\] of shape \(2, 6\)"):
        assemble(SHAPES, [wrong], 1)
    outside = Shard("q.lora_A.weight", ((0, 4), (4, 8)), A[:, :4], 0)
    with pytest.raises(AdapterError, match=r"the tensor's shape is \(4, 6\)"):
        assemble(SHAPES, [outside], 1)
