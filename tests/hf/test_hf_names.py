"""Names of an adapter's tensors that a wrapper changed, and modules that a base does not have: which of the causes."""

import logging

import numpy as np
import plain_llama
import pytest

from kithara_ray.errors import AdapterError, UnsupportedError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.names import adapter_names

PREFIX = "base_model.model."
FORMS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled inside": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "activation checkpointing": lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "fsdp": lambda name: name.replace(".layers", "._fsdp_wrapped_module.layers"),
    "xla fsdp": lambda name: name.replace(".self_attn", "._orig_module.self_attn"),
    "ddp": lambda name: f"module.{name}",
    "ddp inside": lambda name: name.replace(PREFIX, f"{PREFIX}module."),
    "ddp of a compiled model": lambda name: f"module._orig_mod.{name}",
    "adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "two prefixes": lambda name: PREFIX + name,
}


@pytest.mark.parametrize("form", FORMS)
def test_names_that_a_wrapper_changed_are_the_same_adapter(form, tmp_path, caplog):
    plain = Adapter.read(plain_llama.adapter(tmp_path / "plain", "base"))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        found = Adapter.read(plain_llama.adapter(tmp_path / "lora", "base", FORMS[form]))
    assert found.tensors.keys() == plain.tensors.keys()
    assert all(np.array_equal(found.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert "the names of 4 tensors are not those that PEFT saves" in caplog.text


MAGNITUDES = ["", ".weight", ".default", ".default.weight"]


@pytest.mark.parametrize("ending", MAGNITUDES)
def test_magnitudes_are_read_under_the_names_that_peft_has_given_them(ending):
    name = f"{PREFIX}model.layers.0.mlp.up_proj.lora_magnitude_vector{ending}"
    assert adapter_names([name], "file") == {name: "model.layers.0.mlp.up_proj.lora_magnitude_vector"}


BESIDE = {
    "q.lora_B.default.bias": "q.lora_B.bias",
    "q.base_layer.bias": "q.base_layer.bias",
    "_orig_mod.model.norm.bias": "model.norm.bias",
    "lm_head.weight": "lm_head.weight",
    "model.embed_tokens.token_adapter.trainable_tokens_delta": None,
    "model.embed_tokens.token_adapter.trainable_tokens_delta.default": (
        "model.embed_tokens.token_adapter.trainable_tokens_delta"
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_peft_trains_beside_the_factors(name):
    assert adapter_names([PREFIX + name], "file") == {PREFIX + name: BESIDE[name] or name}


def test_a_module_of_the_model_is_no_wrapper():
    name = f"{PREFIX}model.module.layers.0.q_proj.lora_A.weight"
    assert adapter_names([name], "file") == {name: "model.module.layers.0.q_proj.lora_A.weight"}


def test_two_adapters_in_one_file_are_refused():
    names = [f"{PREFIX}q.lora_A.{adapter}.weight" for adapter in ("default", "other")]
    with pytest.raises(AdapterError, match=r"holds the adapters default, other\. Save one of them"):
        adapter_names(names, "file")
    with pytest.raises(AdapterError, match=r"'base_model.model.q.lora_A.weight' and .* are both 'q.lora_A.weight'"):
        adapter_names([f"{PREFIX}q.lora_A.weight", f"{PREFIX}q._orig_mod.lora_A.weight"], "file")


@pytest.mark.parametrize(
    "name", ["q.lora_embedding_A", "q.lora_A.bias", "lora_A.weight", "q.lora_A", "q.lora_A.a.b.weight"]
)
def test_what_is_no_factor_is_refused(name):
    with pytest.raises(UnsupportedError, match="adapters of embeddings are not supported"):
        adapter_names([PREFIX + name if name.startswith("q") else name], "file")


# --- modules that the base does not have -----------------------------------------------------------------------------


def renamed(rename):
    def change(tensors):
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return change


CAUSES = {
    "bare decoder": (dict(prefix=""), {}, "as it was saved from the bare decoder"),
    "adapter of a bare decoder": (
        {},
        {"rename": lambda n: n.replace("model.model.", "model.")},
        "adapter was trained on",
    ),
    "wrapped base": (dict(change=renamed(lambda n: f"_orig_mod.{n}")), {}, "keeps a wrapper's name"),
    "multimodal base": (
        dict(change=renamed(lambda n: n.replace("model.", "model.language_model."))),
        {},
        "one of the two is a multimodal model",
    ),
    "multimodal adapter": ({}, {"rename": lambda n: n.replace("l.layers", "l.language_model.layers")}, "multimodal"),
    "smaller base": ({}, {"rename": lambda n: n.replace("layers.1", "layers.7")}, "it has 2 layers, and the adapter"),
    "another architecture": ({}, {"rename": lambda n: n.replace("model.layers", "transformer.h")}, "another architect"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_of_a_missing_module_is_named(cause, tmp_path):
    base, lora, message = CAUSES[cause]
    opened = BaseCheckpoint.open(plain_llama.write(tmp_path / "base", **base))
    adapter = Adapter.read(plain_llama.adapter(tmp_path / "lora", "base", **lora))
    with pytest.raises(AdapterError, match=f"has no tensor .*{message}") as caught:
        adapter.validate(opened)
    assert "wrong base" not in str(caught.value)


def test_tensors_that_transformers_does_not_use_are_no_targets_of_an_adapter(tmp_path):
    def change(tensors):
        tensors["model.layers.2.self_attn.q_proj.weight"] = np.ones((16, 16), np.float32)
        tensors["mtp.layers.0.self_attn.q_proj.weight"] = np.ones((16, 16), np.float32)

    base = BaseCheckpoint.open(plain_llama.write(tmp_path / "base", change=change))
    Adapter.read(plain_llama.adapter(tmp_path / "lora", "base")).validate(base)
    three = BaseCheckpoint.open(plain_llama.write(tmp_path / "three", change=change, num_hidden_layers=3))
    with pytest.raises(AdapterError, match=r"1 modules .* no factors, first 'model.layers.2.self_attn.q_proj'"):
        Adapter.read(tmp_path / "lora").validate(three)


# --- directories that are something else -----------------------------------------------------------------------------


def test_what_a_directory_is_instead_of_an_adapter(tmp_path):
    lora = plain_llama.adapter(tmp_path / "pickled", "base")
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    output = tmp_path / "output"
    for step in (50, 500):
        plain_llama.adapter(output / f"checkpoint-{step}", "base")
    cases = {
        lora: "adapter_model.bin is a pickle, which is not read. Convert it once",
        output: f"a trainer's output with 2 adapters; give {output}/checkpoint-500",
        plain_llama.write(tmp_path / "model"): "a whole model, not an adapter",
    }
    (tmp_path / "sharded/global_step5").mkdir(parents=True)
    cases[tmp_path / "sharded"] = "the weights are in a trainer's sharded state"
    for directory, message in cases.items():
        with pytest.raises(AdapterError, match=message):
            Adapter.read(directory)


def test_what_a_directory_is_instead_of_a_base(tmp_path):
    from kithara_ray.errors import CheckpointError

    lora = plain_llama.adapter(tmp_path / "lora", "org/name")
    with pytest.raises(CheckpointError, match="it is a PEFT adapter; give its base, 'org/name'"):
        BaseCheckpoint.open(lora)
    plain_llama.write(tmp_path / "output/checkpoint-10")
    with pytest.raises(CheckpointError, match=r"give one of its 1 checkpoints, as .*checkpoint-10"):
        BaseCheckpoint.open(tmp_path / "output")
