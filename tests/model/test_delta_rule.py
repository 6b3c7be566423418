"""The gated delta rule against transformers' own, and packed segments against each by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from kithara_ray.model.blocks import delta_rule
from kithara_ray.model.blocks.delta_rule import gated_delta_rule, short_conv, with_before

B, T, N, K, V = 2, 45, 3, 8, 6


def given(seed=0, alike=0.0):
    """Queries, keys, values, decay, beta; `alike` pulls all keys to one, where the system is worst conditioned."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, N, width)).astype(np.float32) for width in (K, K, V))
    k = (1 - alike) * k + alike * rng.normal(size=K).astype(np.float32)
    decay = -rng.gamma(1.0, 0.3 * (1 - alike) + 1e-3, (B, T, N)).astype(np.float32)
    return q, k, v, decay, rng.uniform(0.05, 1, (B, T, N)).astype(np.float32)


def reference(*arrays, state=None):
    """Token by token, in float64."""
    q, k, v, decay, beta = (torch.tensor(array) for array in arrays)
    out, last = torch_recurrent_gated_delta_rule(
        q, k, v, g=decay, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    return out.numpy(), last.numpy()


@pytest.mark.parametrize("chunk", [1, 8, 64])
@pytest.mark.parametrize("alike", [0.0, 0.98])
def test_chunks_give_what_single_tokens_do(chunk, alike, monkeypatch):
    monkeypatch.setattr(delta_rule, "_CHUNK", chunk)
    out, state = jax.jit(gated_delta_rule)(*given(alike=alike))
    wanted, last = reference(*given(alike=alike))
    np.testing.assert_allclose(out, wanted, atol=2e-5)
    np.testing.assert_allclose(state, last, atol=2e-5)


def test_a_state_is_gone_on_from(monkeypatch):
    monkeypatch.setattr(delta_rule, "_CHUNK", 8)
    arrays = given()
    whole, last = gated_delta_rule(*arrays)
    _, state = gated_delta_rule(*(array[:, :21] for array in arrays))
    rest, end = gated_delta_rule(*(array[:, 21:] for array in arrays), state_BNKV=state)
    np.testing.assert_allclose(rest, whole[:, 21:], atol=1e-5)
    np.testing.assert_allclose(end, last, atol=1e-5)


# Borders inside chunks of 8, at their ends, a segment of one token, and padding behind.
LENGTHS = [5, 3, 1, 14, 9, 13]


@pytest.mark.parametrize("chunk", [8, 64])
def test_packed_segments_are_those_by_themselves(chunk, monkeypatch):
    monkeypatch.setattr(delta_rule, "_CHUNK", chunk)
    arrays = given()
    segments = np.repeat([1, 2, 3, 4, 5, 0], LENGTHS)[None].repeat(B, 0)
    weights = np.random.default_rng(1).normal(size=(V, 4)).astype(np.float32)

    def loss(arrays, segments):
        mixed = short_conv(arrays[2].reshape(*arrays[2].shape[:2], -1), jnp.tile(weights, (N, 1)), segments)
        values = mixed.reshape(arrays[2].shape)
        out, _ = gated_delta_rule(arrays[0], arrays[1], values, *arrays[3:], segments)
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(arrays, jnp.asarray(segments))
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        alone = tuple(array[:, part] for array in arrays)
        (_, wanted), own = jax.value_and_grad(loss, has_aux=True)(alone, None)
        np.testing.assert_allclose(out[:, part], wanted, atol=1e-5)
        for grad, other in zip(grads, own, strict=True):
            np.testing.assert_allclose(grad[:, part], other, atol=3e-5)
        start += length


def test_the_short_convolution_is_torch_s_and_goes_on_from_what_was_before():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(B, T, 5)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    wanted = torch.nn.functional.conv1d(
        torch.tensor(x).swapaxes(1, 2), torch.tensor(weight)[:, None], padding=3, groups=5
    )[:, :, :T].swapaxes(1, 2)
    np.testing.assert_allclose(short_conv(x, weight, None), wanted, atol=1e-5)
    before = with_before(x[:, :17], 4)[:, -3:]
    np.testing.assert_allclose(short_conv(x[:, 17:], weight, None, before), wanted[:, 17:], atol=1e-5)
