"""A frozen base held as integers: what is held, what it costs, what is moved. test_peft_options.py shows that it
computes and trains as PEFT does on the same weights in floats.
"""

import re
from statistics import NormalDist

import jax
import ml_dtypes
import numpy as np
import pytest

from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.causal_lm import build
from kithara_ray.model.weights.quantized import NF4, Quantized, Storage
from kithara_ray.sharding.mesh import make_mesh
from kithara_ray.sharding.shape import MeshShape
from kithara_ray.train import step
from kithara_ray.train.optimizer import KerasOptimizer

LORA = LoraConfig(r=4, lora_alpha=12)


def test_an_int8_weight_is_off_by_half_a_step_at_most():
    kernel = np.random.default_rng(0).normal(size=(24, 3, 40)).astype(np.float32)
    kernel[:, 1, 2] = 0
    values, scales = Storage("int8", (0,)).quantise(kernel, None)
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (np.int8, (24, 3, 40), np.float32, (1, 3, 40))
    assert np.abs(values).max() == 127
    largest = np.abs(kernel).max(axis=0, keepdims=True)
    error = np.abs(values * scales.astype(np.float64) - kernel)
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    assert error.max() > 0.9 * largest.max() / 254
    assert not values[:, 1, 2].any()
    assert scales[0, 1, 2] == 1


@pytest.mark.parametrize(("kind", "error"), [("int4", 0.095), ("nf4", 0.092)])
def test_four_bits_are_off_by_what_is_known_of_normal_weights(kind, error):
    """The figures are the mean over groups of 64; an offset group and one of zeros lie among them."""
    kernel = np.random.default_rng(0).normal(size=(3, 128, 400)).astype(np.float32)
    kernel[1, 64:, 2] = 0
    storage = Storage(kind, (0, 1))
    values, scales = storage.quantise(kernel, storage.group_in(kernel.shape))
    assert (values.dtype, values.shape) == (np.uint8, (3, 64, 400))
    assert (scales.dtype, scales.shape) == (ml_dtypes.bfloat16, (3, 2, 400))
    made = np.asarray(Quantized(values, scales, kind, -2).floats("float32"), np.float64)
    assert np.sqrt(np.square(made - kernel).mean()) == pytest.approx(error, rel=0.01)
    # The largest weight of a group is a level, but for the scale's rounding to eight bits.
    largest = np.abs(kernel).reshape(3, 2, 64, 400).argmax(axis=2, keepdims=True)
    there = [np.take_along_axis(array.reshape(3, 2, 64, 400), largest, 2) for array in (made, kernel)]
    np.testing.assert_allclose(*there, rtol=2**-8)
    assert not made[1, 64:, 2].any()
    assert scales[1, 1, 2] == 1
    assert np.unique(np.concatenate([values & 15, values >> 4])).size == 16


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution():
    """Eight above zero and seven below, from equal steps of probability; QLoRA chose where the steps end."""
    quantiles = lambda count: [NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, count)[:-1]]  # noqa: E731
    levels = np.sort([*quantiles(9), 0.0, *(-level for level in quantiles(8))])
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=1e-6)


def test_a_row_of_odd_width_has_no_pairs():
    with pytest.raises(UnsupportedError, match=r"a kernel \(4, 15\) has 15 in a row"):
        Storage("int4", (1,)).group_in((4, 15))


def rounded_rows(rows, kind, width):
    """A matrix of the file as integers say it, in float32; of four bits in groups that divide each `width` columns."""
    if kind == "int8":
        scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
        return np.rint(rows / scale) * scale
    group = max(size for size in range(2, 65, 2) if width % size == 0)
    groups = rows.reshape(-1, group)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], 1)
    scale = (np.abs(largest) if kind == "nf4" else largest / -8).astype(ml_dtypes.bfloat16).astype(np.float32)
    if kind == "int4":
        return (np.rint(groups / scale).clip(-8, 7) * scale).reshape(rows.shape)
    levels = np.array(NF4, np.float32)
    nearest = np.abs(groups[..., None] / scale[..., None] - levels).argmin(axis=-1)
    return (levels[nearest] * scale).reshape(rows.shape)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(fsdp=1, tensor=3)], ids=["rows split", "columns split"])
def test_kernels_of_linear_layers_are_held_as_integers_and_nothing_else(kind, mesh, tiny_models):
    """Three devices do not divide all of llama's rows; what is split elsewhere has the scale of its whole row."""
    base, mesh = BaseCheckpoint.open(tiny_models["llama"]), make_mesh(mesh, jax.devices()[: 4 if mesh.fsdp < 0 else 3])
    heads = base.config["num_attention_heads"]
    model = build(base.config, LORA, mesh, "float32", quantize=kind)
    frozen = model.load(base)
    abstract = model.abstract_frozen(np.dtype(np.float32))
    for slot, array, promised in zip(model.slots, frozen, abstract, strict=True):
        for leaf, other in zip(jax.tree.leaves(array), jax.tree.leaves(promised), strict=True):
            assert (leaf.shape, leaf.dtype, leaf.sharding) == (other.shape, other.dtype, other.sharding)
        for step_number, port in enumerate(slot.ports):
            (piece,) = port.pieces
            is_linear = piece.hf_name.endswith("_proj.weight")
            assert isinstance(array, Quantized) == is_linear, piece.hf_name
            if is_linear:
                rows = np.asarray(base.view(piece.hf_name))
                width = rows.shape[1] // (heads if "o_proj" in piece.hf_name else 1)
                expected = piece.transform(rounded_rows(rows, kind, width), list(port.shape))
                one = array[step_number] if slot.stacked else array
                np.testing.assert_allclose(one.floats("float32"), expected, atol=1e-6)
    # A kernel of 3 x 128 x 96 weights, a third or a quarter of it on each device.
    (down,) = (a for s, a in zip(model.slots, frozen, strict=True) if "down_proj" in s.key)
    nbytes = 3 * 128 * 96 // mesh.size // (1 if kind == "int8" else 2)
    assert {shard.data.nbytes for shard in down.values.addressable_shards} == {nbytes}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_memory_of_a_device_and_what_is_gathered(kind, tiny_models):
    base, optimizer = BaseCheckpoint.open(tiny_models["gemma2"]), KerasOptimizer(ADAM)
    dtype = np.dtype(ml_dtypes.bfloat16)
    frozen_bytes, argument_bytes, gathered = {}, {}, {}
    for quantize in (None, kind):
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
    # Every kernel here is large enough and divides over the four devices, along its channels.
    held = [slot for slot in model.slots if slot.storage]
    saved = sum(np.prod(slot.shape) * dtype.itemsize - slot.storage.nbytes(slot.shape) for slot in held) // 4
    kernels = sum(np.prod(slot.shape) for slot in held) * dtype.itemsize // 4
    assert frozen_bytes[None] - frozen_bytes[kind] == saved
    assert argument_bytes[None] - argument_bytes[kind] == saved
    assert saved > {"int8": 0.4, "int4": 0.65}[kind] * kernels
    integers = {"int8": "s8", "int4": "u8"}[kind]
    assert integers in gathered[kind]
    assert integers not in gathered[None]


ADAM = {"module": "keras.optimizers", "class_name": "AdamW", "config": {"learning_rate": 1e-3}}


def test_an_unknown_kind_is_refused(tiny_models):
    config = BaseCheckpoint.open(tiny_models["llama"]).config
    with pytest.raises(ConfigError, match=r"quantize must be one of int8, int4, nf4, got 'fp8'"):
        build(config, LORA, make_mesh(), "float32", quantize="fp8")
