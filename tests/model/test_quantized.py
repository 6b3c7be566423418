"""A frozen base held as int8: what is held, what it costs, what is moved. That it computes and trains as PEFT on the
same weights in floats does: test_peft_options.py.
"""

import re

import jax
import ml_dtypes
import numpy as np
import pytest

from kithara_ray.errors import ConfigError
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.causal_lm import build
from kithara_ray.model.weights.quantized import Int8, int8_of
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.train import step
from kithara_ray.train.optimizer import KerasOptimizer

LORA = LoraConfig(r=4, lora_alpha=12)


def test_a_weight_is_off_by_half_a_step_at_most():
    kernel = np.random.default_rng(0).normal(size=(24, 3, 40)).astype(np.float32)
    kernel[:, 1, 2] = 0
    values, scales = int8_of(kernel, contracted=(0,))
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (np.int8, (24, 3, 40), np.float32, (1, 3, 40))
    assert np.abs(values).max() == 127
    largest = np.abs(kernel).max(axis=0, keepdims=True)
    error = np.abs(values * scales.astype(np.float64) - kernel)
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    assert error.max() > 0.9 * largest.max() / 254
    assert not values[:, 1, 2].any()
    assert scales[0, 1, 2] == 1


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(fsdp=1, tensor=3)], ids=["rows split", "columns split"])
def test_kernels_of_linear_layers_are_held_as_int8_and_nothing_else(mesh, tiny_models):
    """Three devices do not divide all of llama's rows; what is split elsewhere has the scale of its whole row."""
    base, mesh = BaseCheckpoint.open(tiny_models["llama"]), make_mesh(mesh, jax.devices()[: 4 if mesh.fsdp < 0 else 3])
    model = build(base.config, LORA, mesh, "float32", quantize="int8")
    frozen = model.load(base)
    for slot, array in zip(model.slots, frozen, strict=True):
        for step_number, port in enumerate(slot.ports):
            (piece,) = port.pieces
            is_linear = piece.hf_name.endswith("_proj.weight")
            assert isinstance(array, Int8) == is_linear, piece.hf_name
            if is_linear:
                rows = np.asarray(base.view(piece.hf_name))
                scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
                expected = piece.transform(np.rint(rows / scale) * scale, list(port.shape))
                one = array[step_number] if slot.stacked else array
                np.testing.assert_allclose(one.floats("float32"), expected, atol=1e-6)
    # A kernel of 3 x 128 x 96 bytes, a third or a quarter of it on each device.
    (down,) = (a for s, a in zip(model.slots, frozen, strict=True) if "down_proj" in s.key)
    assert {shard.data.nbytes for shard in down.values.addressable_shards} == {3 * 128 * 96 // mesh.size}


def test_memory_of_a_device_and_what_is_gathered(tiny_models):
    base, optimizer = BaseCheckpoint.open(tiny_models["gemma2"]), KerasOptimizer(ADAM)
    dtype = np.dtype(ml_dtypes.bfloat16)
    frozen_bytes, argument_bytes, gathered = {}, {}, {}
    for quantize in (None, "int8"):
        model = build(base.config, LORA, make_mesh(), "mixed_bfloat16", quantize=quantize)
        frozen = model.abstract_frozen(dtype)
        leaves = jax.tree.leaves(frozen)
        frozen_bytes[quantize] = sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
        )
        state, batch = step.abstract_state(model, optimizer), step.abstract_batch(model, 4, 16, 8)
        compiled = step.compile_step(model, optimizer, state, frozen, batch)
        argument_bytes[quantize] = compiled.memory_analysis().argument_size_in_bytes
        gathered[quantize] = set(re.findall(r"= \(?(\w+)\[[\d,]+\]\S* all-gather", compiled.as_text()))
    kernels = sum(np.prod(slot.shape) for slot in model.slots if slot.contracted)
    channels = sum(np.prod(slot.scales_shape) for slot in model.slots if slot.contracted)
    # Every kernel here is large enough and divides over the four devices, along its channels.
    saved = kernels // 4 * (dtype.itemsize - 1) - channels // 4 * 4
    assert frozen_bytes[None] - frozen_bytes["int8"] == saved
    assert argument_bytes[None] - argument_bytes["int8"] == saved
    assert saved > 0.4 * kernels // 4 * dtype.itemsize
    assert "s8" in gathered["int8"]
    assert "s8" not in gathered[None]


ADAM = {"module": "keras.optimizers", "class_name": "AdamW", "config": {"learning_rate": 1e-3}}


def test_an_unknown_kind_is_refused(tiny_models):
    config = BaseCheckpoint.open(tiny_models["llama"]).config
    with pytest.raises(ConfigError, match=r"quantize must be one of \(None, 'int8'\), got 'int4'"):
        build(config, LORA, make_mesh(), "float32", quantize="int4")
