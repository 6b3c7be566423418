"""Attention by segments: packed rows against their samples alone in transformers; the TPU kernel against XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sizes import VOCABULARY
from tiny import SHORT_FAMILIES, load

from kithara_ray.errors import UnsupportedError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.model.blocks import attention
from kithara_ray.model.blocks.attention import Kernel, Settings, splash_attention, xla_attention
from kithara_ray.model.causal_lm import build
from kithara_ray.model.options import fuses_backward
from kithara_ray.sharding.mesh import batch_sharding, make_mesh
from kithara_ray.sharding.shape import MeshShape

pytestmark = pytest.mark.usefixtures("hastily")

# Lengths of the samples of each row; longer than gemma2's window, one row with padding behind.
PACKS = [(13, 4, 10), (1, 26), (9, 9, 9), (12, 11)]
T = 27


def packed():
    """token_ids, segment_ids (4, T) and the samples as (row, slice)."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, VOCABULARY, (len(PACKS), T)).astype(np.int32)
    segments = np.zeros_like(tokens)
    samples = []
    for row, lengths in enumerate(PACKS):
        start = 0
        for number, length in enumerate(lengths, start=1):
            segments[row, start : start + length] = number
            samples.append((row, slice(start, start + length)))
            start += length
    return tokens, segments, samples


# Families of the short tests, one with a recurrent state, and others whose positions in a sample matter: the sample's
# length chooses the rotation, norms come after it, or queries grow. tests/train/test_gradients.py packs every family.
PACKED = (*SHORT_FAMILIES, "qwen3_5_text", "phi3", "hunyuan_v1_dense", "ministral3")


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_row_computes_what_its_samples_do_alone(name, tiny_models):
    assert_as_alone(name, tiny_models, scan=True)


@pytest.mark.parametrize("name", SHORT_FAMILIES)
def test_so_it_does_without_the_scan(name, tiny_models):
    assert_as_alone(name, tiny_models, scan=False)


def assert_as_alone(name, tiny_models, scan):
    tokens, segments, samples = packed()
    reference = load(tiny_models[name]).eval()
    base, mesh = BaseCheckpoint.open(tiny_models[name]), make_mesh()
    model = build(base.config, None, mesh, "float32", scan=scan)
    placed = [jax.device_put(array, batch_sharding(mesh)) for array in (tokens, segments)]
    logits = np.asarray(jax.jit(model.logits_BTV)({}, model.load(base), *placed))
    for row, own in samples:
        with torch.no_grad():
            alone = reference(torch.tensor(tokens[None, row, own]).long()).logits[0].numpy()
        np.testing.assert_allclose(logits[row, own], alone, atol=1e-4, rtol=0)


SETTINGS = {
    "causal": (Settings(0.125), False),
    "window": (Settings(0.125, window=100), False),
    "soft cap": (Settings(0.25, soft_cap=5.0), False),
    "window, cap and sinks": (Settings(0.25, window=33, soft_cap=8.0), True),
}


@pytest.mark.parametrize("remat", ["block", pytest.param("dots", marks=pytest.mark.long)])
@pytest.mark.parametrize("case", SETTINGS)
def test_the_tpu_kernel_equals_xla_and_so_do_its_gradients(case, remat, monkeypatch):
    """In Pallas' interpret mode, rows split over fsdp and heads over tensor.

    Backward it is two kernels, or one over two blocks of keys that are two tiles long.
    """
    settings, with_sinks = SETTINGS[case]
    b, t, n, kv, h = 2, 256, 4, 2, 64
    if remat == "dots":
        monkeypatch.setattr(attention, "_MAX_TILE", 128)
        monkeypatch.setattr(attention, "FUSED_KEYS", 256)
        t = 512
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2))
    keys = jax.random.split(jax.random.key(0), 5)
    q, upstream = (jax.random.normal(key, (b, t, n, h)) for key in keys[:2])
    k, v = (jax.random.normal(key, (b, t, kv, h)) for key in keys[2:4])
    sinks = jax.random.normal(keys[4], (n,)) if with_sinks else None
    segments = jnp.asarray(
        np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], np.array([60, 70, 80, 46]) * t // 256, axis=1), jnp.int32
    )

    def gradients(attend):
        def loss(q, k, v):
            out = attend(q, k, v, segments, settings, sinks)
            return jnp.sum(out * upstream), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    kernel = gradients(lambda *args: splash_attention(*args, how=Kernel(mesh, remat, interpret=True)))
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), kernel, gradients(xla_attention), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-4, err_msg=name)


def test_what_the_kernel_cannot_split_is_named():
    mesh = make_mesh(MeshShape(fsdp=1, tensor=4))
    q = jnp.zeros((1, 128, 4, 64))
    with pytest.raises(UnsupportedError, match="mesh tensor=4 does not divide the model's 2 key and value heads"):
        splash_attention(q, q[:, :, :2], q[:, :, :2], jnp.ones((1, 128), int), Settings(1.0), how=Kernel(mesh))
    with pytest.raises(UnsupportedError, match="a multiple of 128 tokens, got 100"):
        splash_attention(*[jnp.zeros((1, 100, 4, 64))] * 3, jnp.ones((1, 100), int), Settings(1.0), how=Kernel(mesh))


def test_one_backward_kernel_writes_eight_parts_at_most():
    assert [fuses_backward("dots", t) for t in (896, 4096, 8192)] == [True] * 3
    assert [fuses_backward("dots", t) for t in (1152, 8064, 9216)] == [False] * 3
    assert not fuses_backward("block", 4096)
