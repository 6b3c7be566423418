"""Rotary frequencies and rotations beside transformers': each type, and samples of several lengths in one row."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as interleaved_pairs
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from kithara_ray.errors import UnsupportedError
from kithara_ray.model.decoder.layers import rotated, sample_lengths
from kithara_ray.model.decoder.rope import TYPES, rotation_of
from kithara_ray.model.families.family import rope_of

WIDTH, POSITIONS = 32, 128
_YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=32)
ROPES = {
    "default": dict(rope_type="default", rope_theta=1e6),
    "linear": dict(rope_type="linear", rope_theta=1e5, factor=4.0),
    "dynamic": dict(rope_type="dynamic", rope_theta=500.0, factor=6.0),
    "llama3": dict(
        rope_type="llama3",
        rope_theta=5e5,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "yarn": _YARN,
    "yarn, between two dims": dict(_YARN, truncate=False, beta_fast=16.0, beta_slow=2.0),
    "yarn, its own scale": dict(_YARN, attention_factor=0.8),
    "yarn, deepseek's scale": dict(_YARN, mscale=0.7, mscale_all_dim=0.3),
    "yarn, no factor": dict(_YARN, factor=None),
    "longrope": dict(
        rope_type="longrope",
        rope_theta=1e4,
        original_max_position_embeddings=32,
        short_factor=[1.0 + i / 8 for i in range(WIDTH // 2)],
        long_factor=[2.0 + i for i in range(WIDTH // 2)],
    ),
}


def config_of(rope):
    return LlamaConfig(
        hidden_size=4 * WIDTH, num_attention_heads=4, max_position_embeddings=POSITIONS, rope_parameters=dict(rope)
    )


def theirs_of(rope, length):
    """(frequencies, scale) of transformers for a sequence of this length."""
    config = config_of(rope)
    if rope["rope_type"] == "default":
        return PhiRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, seq_len=length)


def test_every_type_is_compared():
    assert {rope["rope_type"] for rope in ROPES.values()} == set(TYPES)


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["whole heads", "half of a head"])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name, share):
    rope = ROPES[name] | {"partial_rotary_factor": share}
    if name == "longrope":
        rope |= {key: rope[key][: int(WIDTH * share) // 2] for key in ("short_factor", "long_factor")}
    ours = rotation_of(rope, WIDTH, POSITIONS)
    frequencies, scale = theirs_of(rope, 16)
    np.testing.assert_allclose(ours.frequencies, frequencies.numpy(), rtol=1e-6)
    assert ours.scale == pytest.approx(scale, rel=1e-12)
    if ours.longer is not None:
        np.testing.assert_allclose(ours.longer, theirs_of(rope, 2 * POSITIONS)[0].numpy(), rtol=1e-6)


# Samples of one row, in the order in which they are packed, and padding.
LENGTHS = (40, 20, 200, 60)


@pytest.mark.parametrize("name", ["default", "longrope", "dynamic", "yarn"])
def test_packed_samples_are_rotated_as_each_alone(name):
    """Their products, which alone count, are those of transformers for a sequence of the sample's own length."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.full(length, 0 if number == 3 else number + 1) for number, length in enumerate(LENGTHS)])
    query, key = rng.normal(size=(2, 1, len(ids), 2, WIDTH)).astype(np.float32)
    rotation = rotation_of(ROPES[name], WIDTH, POSITIONS)
    lengths = sample_lengths(jnp.asarray(ids)[None])
    ours = [np.asarray(rotated(jnp.asarray(a), jnp.arange(len(ids)), rotation, lengths)) for a in (query, key)]
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        frequencies, scale = theirs_of(ROPES[name], length)
        if rotation.limit is None:
            frequencies, scale = theirs_of(ROPES[name], None)
        angles = torch.arange(length)[:, None].float() * frequencies
        cos, sin = (torch.cat([wave, wave], -1)[None] * scale for wave in (angles.cos(), angles.sin()))
        theirs = apply_rotary_pos_emb(*(torch.tensor(a[:, part].swapaxes(1, 2)) for a in (query, key)), cos, sin)
        products = [np.einsum("bnth,bnsh->bnts", *(a.numpy() for a in theirs))]
        products += [np.einsum("btnh,bsnh->bnts", *(a[:, part] for a in ours))]
        np.testing.assert_allclose(products[1], products[0], atol=3e-4 * scale**2)
        start += length


def test_neighbouring_places_are_rotated_as_pairs():
    rope = ROPES["default"] | {"partial_rotary_factor": 0.5}
    rotation = rotation_of(rope, WIDTH, POSITIONS, interleaved=True)
    array = np.random.default_rng(0).normal(size=(1, 9, 2, WIDTH)).astype(np.float32)
    ours = rotated(jnp.asarray(array), jnp.arange(9), rotation, jnp.ones((1, 9), jnp.int32))
    angles = torch.arange(9)[:, None].float() * theirs_of(rope, None)[0]
    cos, sin = (torch.cat([wave, wave], -1)[None] for wave in (angles.cos(), angles.sin()))
    theirs, _ = interleaved_pairs(*[torch.tensor(array.swapaxes(1, 2))] * 2, cos, sin)
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy().swapaxes(1, 2), atol=1e-5)


PLACES = {
    "former names": dict(rope_theta=500.0, rope_scaling=dict(type="yarn", factor=4.0)),
    "beside the settings": dict(rope_parameters=dict(_YARN), original_max_position_embeddings=16),
    "a share of a head": dict(rope_theta=500.0, partial_rotary_factor=0.5),
    "both names": dict(rope_parameters=dict(_YARN), rope_scaling=dict(rope_type="linear", factor=2.0)),
}


@pytest.mark.parametrize("name", PLACES)
def test_settings_are_found_where_transformers_finds_them(name):
    fields = dict(PLACES[name], max_position_embeddings=POSITIONS)
    config = LlamaConfig(**fields)
    config.standardize_rope_params()
    assert rope_of(fields) == config.rope_parameters


def test_an_unknown_type_and_factors_of_another_number_are_refused():
    with pytest.raises(UnsupportedError, match="rope type 'spiral' is not supported; supported are default, "):
        rotation_of({"rope_type": "spiral", "rope_theta": 1e4}, WIDTH)
    with pytest.raises(ValueError, match="short_factor of rope_parameters has 16 numbers, not 8"):
        rotation_of(ROPES["longrope"], WIDTH // 2, POSITIONS)
    with pytest.raises(ArithmeticError):
        rotation_of({"rope_type": "default", "rope_theta": 0}, WIDTH)
