"""The general decoder block: KerasHub's families where their own blocks end, and what neither can compute."""

import json

import keras
import numpy as np
import pytest
from parity import assert_equal, logits, reference
from tiny import OWN, SIZES, write_model
from transformers import AutoModelForCausalLM

from kithara_ray.errors import UnsupportedError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.tower import text_of
from kithara_ray.model import keras_compat
from kithara_ray.model.decoder.backbone import DecoderBackbone
from kithara_ray.model.decoder.description import XIELU, Norm
from kithara_ray.model.decoder.layers import DecoderActivation, DecoderNorm
from kithara_ray.model.families import FAMILIES, family_of
from kithara_ray.model.families.family import completed

_YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=8)
_ON_A_PART = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
# Fields that KerasHub's block of the family cannot say.
BEYOND = {
    "biases and wide heads": ("llama", dict(attention_bias=True, mlp_bias=True, head_dim=32)),
    "linear rope": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0))),
    "yarn": ("llama", dict(head_dim=32, rope_parameters=_YARN)),
    "tied": ("mistral", dict(tie_word_embeddings=True)),
    "windows on a part": ("qwen2", _ON_A_PART),
    "windows and biases": ("qwen3", dict(_ON_A_PART, attention_bias=True)),
    "untied": (
        "smollm3",
        dict(tie_word_embeddings=False, attention_bias=True, use_sliding_window=True, sliding_window=8),
    ),
}


@pytest.mark.parametrize("name", [*BEYOND][:1] + [pytest.param(n, marks=pytest.mark.long) for n in [*BEYOND][1:]])
@pytest.mark.usefixtures("hastily")
def test_logits_beyond_kerashub_s_blocks(name, tmp_path):
    family, fields = BEYOND[name]
    directory = write_model(tmp_path / "model", family, **fields)
    config = BaseCheckpoint.open(directory).config
    assert FAMILIES[family].described(completed(FAMILIES[family], config)) is not None
    assert_equal(logits(directory), reference(AutoModelForCausalLM.from_pretrained(directory)), 1e-4)


def test_what_kerashub_has_stays_on_kerashub(tiny_models):
    for row in SIZES.keys() - OWN.keys():
        config = text_of(json.loads((tiny_models[row] / "config.json").read_text()))
        family = config["model_type"]
        if family in OWN:  # in a multimodal model
            continue
        assert FAMILIES[family].described(completed(FAMILIES[family], config)) is None, family
    assert not any(FAMILIES[family].converter for family in OWN)


REFUSED = {
    "an activation": ("llama", dict(hidden_act="mish"), "hidden_act='mish' .*: supported are silu, "),
    "a rope type": ("qwen3", dict(rope_parameters={"rope_type": "spiral"}), "rope type 'spiral' is not supported"),
    "a part of a head": (
        "llama",
        dict(rope_parameters={"partial_rotary_factor": 0.5}),
        "transformers rotates all of a head's width here",
    ),
    "key heads": ("llama", dict(head_dim=32, num_key_value_heads=4), "it does not divide num_attention_heads=6"),
    "kinds of blocks": (
        "olmo3",
        dict(layer_types=["full_attention", "chunked_attention", "full_attention"]),
        "it needs 'sliding_attention' or 'full_attention' for each",
    ),
    "a window": ("olmo3", dict(sliding_window=None), "sliding_window=None .*, which needs a number of tokens"),
    "a factor too few": (
        "phi3",
        dict(rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 6}),
        "short_factor of rope_parameters has 1 numbers, not 8",
    ),
    "phi3's rope": ("phi3", dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "default and longrope here"),
    "norms of each head": ("stablelm", dict(qk_layernorm=True), "a norm of each head's own"),
    "heads of another width": ("cohere2", dict(head_dim=32), "head_dim=32 of this cohere2 model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_block_computes_is_refused_by_the_field(name):
    family, fields, text = REFUSED[name]
    config = dict(SIZES[family], model_type=family, vocab_size=320, hidden_act="silu") | fields
    with pytest.raises(UnsupportedError, match=text):
        family_of(config)


def test_blocks_hold_no_value_before_they_are_loaded(tiny_models):
    """A decoder of 1.4 B parameters takes the memory of its description."""
    config = json.loads((tiny_models["olmo3"] / "config.json").read_text())
    config |= dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=3, vocab_size=100_000)
    with keras_compat.without_values():
        backbone = family_of(config).build(config, keras.DTypePolicy("mixed_bfloat16"))
    assert isinstance(backbone, DecoderBackbone)
    assert sum(int(np.prod(variable.shape)) for variable in backbone.variables) > 5e8
    assert not any(variable._value is not None for variable in backbone.variables)


def test_norms_are_rounded_once():
    import torch

    values = np.random.default_rng(0).normal(3, 2, (4, 64)).astype(np.float32)
    for norm in (Norm("rms", 1e-5), Norm("layer", 1e-5, bias=True, offset=1.0)):
        layer = DecoderNorm(norm, dtype="float32")
        layer.build(values.shape)
        layer.scale.assign(np.linspace(-1, 2, 64))
        weight = torch.tensor(np.linspace(-1, 2, 64).astype(np.float32)) + norm.offset
        given = torch.tensor(values)
        if norm.kind == "rms":
            wanted = torch.nn.functional.rms_norm(given, (64,), weight, 1e-5)
        else:
            layer.bias.assign(np.linspace(2, 3, 64))
            wanted = torch.nn.functional.layer_norm(given, (64,), weight, torch.tensor(np.asarray(layer.bias)), 1e-5)
        np.testing.assert_allclose(np.asarray(layer(values)), wanted.numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "swish", "xielu"])
def test_activations_are_transformers(name):
    import torch
    from transformers.activations import ACT2CLS, ACT2FN

    values = np.linspace(-6, 6, 101).astype(np.float32)
    layer = DecoderActivation(name, dtype="float32")
    layer.build(values.shape)
    if name == "xielu":
        theirs = ACT2CLS[name](dtype=torch.float32)
        with torch.no_grad():
            theirs.alpha_p += 0.3
        for number, own in zip(layer.numbers, XIELU, strict=True):
            number.assign(getattr(theirs, own).detach().numpy())
    else:
        theirs = ACT2FN[name]
    with torch.no_grad():
        wanted = theirs(torch.tensor(values)).numpy()
    np.testing.assert_allclose(np.asarray(layer(values)), wanted, atol=2e-6)
