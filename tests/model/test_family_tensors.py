"""Tensors that config.json says a checkpoint has, beside what transformers writes; and what the driver refuses."""

import json
import re

import numpy as np
import plain_llama
import pytest
from tiny import MULTIMODAL, SIZES, config_of, model_type

from kithara_ray.errors import CheckpointError, UnsupportedError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.tower import WRAPPERS, is_beside, is_in_tower
from kithara_ray.model.families import FAMILIES
from kithara_ray.model.families.tensors import check_tensors, expected_tensors, unused_note
from kithara_ray.model.weights.slots import check_complete

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def shapes_of(expected):
    return {name: tuple(size for _, size in dims) for name, dims in expected.items()}


@pytest.mark.parametrize("family", SIZES)
def test_a_family_has_the_tensors_that_transformers_writes(family, tiny_models):
    base = BaseCheckpoint.open(tiny_models[family])
    there = {name: info.shape for name, info in base.tensors.items() if not is_beside(base.config, name)}
    assert shapes_of(expected_tensors(base.config)) == there
    assert (len(there) < len(base.tensors)) == (family in MULTIMODAL)
    assert check_tensors(base) == []


def test_every_family_is_known():
    assert set(map(model_type, SIZES)) == {*FAMILIES, *WRAPPERS}
    assert expected_tensors({"model_type": "another"}) is None


def kinds_of(names):
    """The first tensor of each kind: the names without the numbers in them."""
    return {re.sub(r"\d+", "N", name): name for name in reversed(sorted(names))}.values()


def test_each_tensor_is_used_or_known_or_an_error(every_family, tiny_models):
    base = BaseCheckpoint.open(tiny_models[every_family])

    def tensors(change):
        held = dict(base.tensors)
        change(held)
        return BaseCheckpoint(base.directory, base.config, held, base.files)

    places = [""]
    for name in kinds_of(name for name in base.tensors if is_in_tower(base.config, name)):
        with pytest.raises(CheckpointError, match=r"missing|lack the prefix"):
            check_tensors(tensors(lambda held, name=name: held.pop(name)), values=False)
        places += [name.rpartition(".")[0] + ".", name.partition(".")[0] + "."]
    for place in sorted(set(places)):
        other = f"{place}other"
        with pytest.raises(CheckpointError, match=f"1 tensors belong to nothing in the model, the first is {other}"):
            check_tensors(tensors(lambda held, other=other: held.update({other: held[name]})), values=False)


VARIANTS = {
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    "keys for all heads": ("llama", dict(num_key_value_heads=6)),
    "untied": ("qwen2", dict(tie_word_embeddings=False)),
    "heads wider than the model": ("qwen3", dict(head_dim=48)),
    "values of their own": ("gemma4_text", dict(attention_k_eq_v=False, num_global_key_value_heads=None)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_fields_change_the_tensors_as_in_transformers(name):
    import torch
    import transformers

    family, fields = VARIANTS[name]
    config = config_of(family, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    there = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del there[HEAD]
    assert shapes_of(expected_tensors(json.loads(config.to_json_string(use_diff=False)))) == there


# --- what does not belong together -----------------------------------------------------------------------------------


def longer(tensors):
    tensors[EMBEDDING] = np.zeros((40, plain_llama.HIDDEN), np.float32)


def without(name):
    return lambda tensors: tensors.pop(name)


def renamed(tensors, rename):
    for name in list(tensors):
        tensors[rename(name)] = tensors.pop(name)


WRONG = {
    "resized": (dict(change=longer), r"embed_tokens.weight has shape \(40, 16\), and config.json gives \(32, 16\), "),
    "no head": (dict(change=without(HEAD)), r"lm_head.weight is missing, .* \"tie_word_embeddings\": true"),
    "fewer layers": (dict(num_hidden_layers=3), r"9 tensors are missing of the 30 .* model\.layers\.2\."),
    "more layers": (dict(num_hidden_layers=1), r"9 tensors belong to nothing .* config.json has 1 layers"),
    "bare decoder": (dict(prefix=""), r"lack the prefix 'model\.': 'embed_tokens.weight' .*AutoModelForCausalLM"),
    "bare decoder without a head": (dict(prefix="", change=without(HEAD)), r"lack the prefix 'model\.'"),
    "narrower MLP": (dict(intermediate_size=8), r"gate_proj.weight has shape \(24, 16\), .*intermediate_size"),
    "compiled": (
        dict(change=lambda tensors: renamed(tensors, lambda name: f"_orig_mod.{name}")),
        "keep what a wrapper added, the first is '_orig_mod.model.embed_tokens.weight'",
    ),
    "multimodal": (
        dict(change=lambda tensors: renamed(tensors, lambda name: f"language_model.{name}")),
        "'language_model.lm_head.weight' is of a multimodal checkpoint",
    ),
    "unknown tensor": (
        dict(change=lambda tensors: tensors.update({"model.extra.weight": np.ones(3, np.float32)})),
        "1 tensors belong to nothing in the model, the first is model.extra.weight",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_config_and_headers_that_disagree_are_refused(name, tmp_path):
    how, message = WRONG[name]
    base = BaseCheckpoint.open(plain_llama.write(tmp_path / "base", **how))
    for check in (check_tensors, lambda base: check_complete(base, [])):
        with pytest.raises(CheckpointError, match=message):
            check(base)


def test_a_tensor_that_transformers_computes_is_not_refused(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change = lambda tensors: tensors.update({name: np.ones(2, np.float32)})  # noqa: E731
    base = BaseCheckpoint.open(plain_llama.write(tmp_path / "base", change=change))
    assert check_tensors(base) == [name]
    assert "1 tensors are not used by the model" in unused_note(base, [name])
    assert unused_note(base, []) is None


def test_a_layer_too_many_is_merged_past_and_told(tmp_path):
    base = BaseCheckpoint.open(plain_llama.write(tmp_path / "base", num_hidden_layers=1))
    unused = check_tensors(base, trains=False)
    assert len(unused) == 9
    assert "config.json describes a model without it" in unused_note(base, unused)


def test_layers_that_predict_further_tokens_are_told(tmp_path):
    fields = dict(num_hidden_layers=1, num_nextn_predict_layers=1)
    base = BaseCheckpoint.open(plain_llama.write(tmp_path / "base", **fields))
    unused = check_tensors(base)
    assert len(unused) == 9
    assert "builds no layers that predict further tokens" in unused_note(base, unused)


@pytest.mark.parametrize("dtype", [np.float64, np.int8])
def test_a_dtype_that_would_be_rounded_is_refused(dtype, tmp_path):
    change = lambda tensors: tensors.update({"model.norm.weight": np.ones(16, dtype)})  # noqa: E731
    base = BaseCheckpoint.open(plain_llama.write(tmp_path / "base", change=change))
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight is (F64|I8); weights are read as float32"):
        check_tensors(base)


def test_plan_reads_the_headers(tmp_path):
    from kithara_ray.plan.planner import config_of

    directory = plain_llama.write(tmp_path / "base", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="tensors are missing"):
        config_of(directory)
    (directory / "model.safetensors").unlink()
    assert config_of(directory)[0]["num_hidden_layers"] == 3
