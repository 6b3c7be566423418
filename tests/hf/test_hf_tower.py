"""The text model inside a multimodal checkpoint: names in files, adapters of the whole model, and merged exports."""

import json
import re
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny import MULTIMODAL, load, model_type

from kithara_ray.errors import AdapterError, CheckpointError, ConfigError, UnsupportedError
from kithara_ray.hf.adapter import Adapter, LoraConfig, target_modules_of
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import export_with_report
from kithara_ray.hf.exports.options import ExportOptions
from kithara_ray.hf.exports.trained import TensorSlice, TrainedWriter, checksum
from kithara_ray.hf.tied_head import is_tied
from kithara_ray.hf.tower import WRAPPERS, is_beside, text_of
from kithara_ray.model.families import FAMILIES, family_of
from kithara_ray.model.families.family import completed
from kithara_ray.model.families.tensors import check_tensors
from kithara_ray.model.lora.targets import check_targets, linear_modules_of, lora_config_of, other_modules_of
from kithara_ray.orchestration.model import KerasHubModel

WEIGHTS = "model.safetensors"
DEFAULTS = dict(
    **{name: None for name in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform")},
    init_lora_weights=True,
)


@pytest.fixture(scope="module")
def directory(tiny_models):
    return tiny_models["gemma3"]


@pytest.fixture(scope="module")
def base(directory):
    return BaseCheckpoint.open(directory)


def respelled(directory, out, *changes):
    """A copy of a model whose tensors have other names."""
    shutil.copytree(directory, out)
    tensors = load_file(out / WEIGHTS)
    for pattern, new in changes:
        tensors = {re.sub(pattern, new, name): array for name, array in tensors.items()}
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    return out


# As transformers 5 and Google's own files have them.
SPELLINGS = {
    "newer": [(r"^language_model\.model\.", "model.language_model."), (r"^(vision|multi)", r"model.\1")],
    "published": [(r"^vision_tower\.", "vision_tower.vision_model.")],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_in_files_are_read_in_every_spelling(spelling, directory, base, tmp_path):
    other = BaseCheckpoint.open(respelled(directory, tmp_path / "other", *SPELLINGS[spelling]))
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory)
    there = set(model.state_dict()) - {"lm_head.weight"}
    assert set(base.names) == set(other.names) == there
    assert all((base.view(name) == other.view(name)).all() for name in base.names)
    check_tensors(other)


def test_two_spellings_of_one_tensor_are_refused(directory, tmp_path):
    out = respelled(directory, tmp_path / "twice")
    tensors = load_file(out / WEIGHTS)
    tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"]
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"are both 'model\.language_model\.norm\.weight'; save the model again"):
        BaseCheckpoint.open(out)


def test_a_tensor_of_no_known_part_is_refused(directory, tmp_path):
    other = BaseCheckpoint.open(respelled(directory, tmp_path / "other", (r"^multi_modal_projector", "adaptor")))
    with pytest.raises(CheckpointError, match=r"2 tensors belong to nothing in the model, the first is adaptor\.mm"):
        check_tensors(other)


def test_a_wrapper_without_its_text_model_s_config_is_refused():
    with pytest.raises(UnsupportedError, match=r"this gemma3 model has no text_config \(found None\)"):
        family_of({"model_type": "gemma3"})


def test_a_field_that_counts_in_the_text_model_alone_is_refused(base):
    text = base.config["text_config"] | {"final_logit_softcapping": 3.0}
    family_of(text)
    with pytest.raises(UnsupportedError, match=r"final_logit_softcapping=3\.0 .* in the text model alone"):
        family_of(base.config | {"text_config": text})


@pytest.mark.parametrize("value", [None, False])
@pytest.mark.parametrize("place", ["top", "text_config"])
def test_attention_that_looks_ahead_is_refused_wherever_it_is_asked_for(place, value, tiny_models, tmp_path):
    shutil.copytree(tiny_models["mistral3"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (config if place == "top" else config[place])["is_causal"] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    tokens = torch.arange(3, 12)[None]
    plain, changed = (load(at).eval()(tokens).logits for at in (tiny_models["mistral3"], tmp_path / "model"))
    # A null at the top moves nothing here. "eager" attention reads it as false, and so does gemma2.
    assert torch.allclose(plain, changed, atol=1e-4) == ((place, value) == ("top", None))
    with pytest.raises(UnsupportedError, match=f"is_causal={value} of this mistral3 model: .*see all others"):
        family_of(config)


def test_the_whole_model_decides_whether_its_head_is_tied():
    text = {"model_type": "gemma3_text", "tie_word_embeddings": False}
    assert text_of({"model_type": "gemma3", "text_config": text})["tie_word_embeddings"] is True
    untied = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False, "dtype": "bfloat16"}
    assert text_of(untied) == text | {"dtype": "bfloat16"}


ALIASES = sorted(kind for kind, wrapper in WRAPPERS.items() if wrapper.alias)


@pytest.mark.parametrize("kind", ALIASES)
def test_fields_that_an_alias_leaves_out_are_those_of_transformers(kind):
    text = dict(num_hidden_layers=9, num_attention_heads=64, use_sliding_window=kind != "qwen3_vl")
    given = text_of({"model_type": kind, "text_config": text})
    ours = completed(FAMILIES[given["model_type"]], given)
    theirs = transformers.AutoConfig.for_model(kind, text_config=text).text_config.to_dict()
    assert {"rms_norm_eps", "num_key_value_heads", "rope_parameters"} <= ours.keys()
    # Read only with windows, which qwen3_vl does not have.
    fixed = {"model_type", "tie_word_embeddings", *WRAPPERS[kind].fixed}
    fixed |= {"sliding_window", "max_window_layers"} if kind == "qwen3_vl" else set()
    assert {name: value for name, value in ours.items() if name not in fixed} == {
        name: theirs[name] for name in ours.keys() - fixed
    }


def test_a_published_config_with_the_text_model_s_fields_at_its_top(tiny_models, tmp_path):
    """As Qwen2.5-VL's: no text_config, rope type mrope, and tensors without language_model."""
    shutil.copytree(tiny_models["qwen2_5_vl"], tmp_path / "model")
    nested = BaseCheckpoint.open(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    text = {name: value for name, value in config.pop("text_config").items() if name != "model_type"}
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    (tmp_path / "model" / "config.json").write_text(json.dumps(text | config))
    older = (r"^model\.language_model\.", "model.")
    flat = BaseCheckpoint.open(respelled(tmp_path / "model", tmp_path / "flat", older))
    assert any(info.stored.startswith("model.layers.0.") for info in flat.tensors.values())
    assert flat.names == nested.names
    check_tensors(flat)
    family = family_of(flat.config)
    assert family is FAMILIES["qwen2"]
    ours, theirs = (completed(family, text_of(base.config)) for base in (flat, nested))
    rope = {name: ours["rope_parameters"][name] for name in ("rope_type", "rope_theta")}
    assert rope == {"rope_type": "default", "rope_theta": 500.0}
    kept = theirs.keys() - {"rope_parameters", "model_type"}
    assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
    one, other = (load(base.directory).eval()(torch.arange(9)[None]).logits for base in (flat, nested))
    assert torch.equal(one, other)


@pytest.mark.parametrize("given", [True, False, None])
def test_a_mistral3_that_does_not_say_it_ties_its_head_as_its_text_model_does(given, tiny_models, tmp_path):
    """As the published ones; transformers ties a head that the file does not have."""
    shutil.copytree(tiny_models["mistral3"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    if given is not None:
        config["text_config"]["tie_word_embeddings"] = given
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    if given:
        tensors = load_file(tmp_path / "model" / WEIGHTS)
        del tensors["language_model.lm_head.weight"]
        save_file(tensors, tmp_path / "model" / WEIGHTS, {"format": "pt"})
    base = BaseCheckpoint.open(tmp_path / "model")
    check_tensors(base)
    model = load(tmp_path / "model")
    assert is_tied(base.config) == bool(given)
    assert torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight) == bool(given)


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted_by_peft(directory):
    from peft.tuners.lora import LoraLayer

    def adapted(**settings):
        model = transformers.AutoModelForImageTextToText.from_pretrained(directory)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
        return {name for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}

    return adapted


CHOICES = {
    "names": dict(target_modules=("q_proj", "v_proj")),
    "ends of names": dict(target_modules=("layers.1.mlp.up_proj", "k_proj")),
    "whole names": dict(
        target_modules=("model.language_model.layers.2.self_attn.q_proj", "language_model.layers.1.mlp.up_proj")
    ),
    "expression": dict(target_modules=r".*\.(q|k)_proj"),
    "expression of the text model": dict(target_modules=r"model\.language_model\..*\.k_proj"),
    "blocks": dict(target_modules=("q_proj",), layers_to_transform=[1, 3]),
    "blocks and exclusions": dict(
        target_modules=("q_proj", "k_proj"), layers_to_transform=[0, 1], exclude_modules=["1.self_attn.k_proj"]
    ),
    "exclusions": dict(target_modules=("q_proj", "k_proj"), exclude_modules=r".*\.1\..*"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_targets_leave_the_vision_tower_alone(choice, base, adapted_by_peft):
    chosen = CHOICES[choice]
    lora = lora_config_of(2, base, **DEFAULTS | chosen)
    targets = chosen["target_modules"]
    given = {name: value for name, value in chosen.items() if value is not None}
    given["target_modules"] = targets if isinstance(targets, str) else list(targets)
    wanted = {name for name in adapted_by_peft(**given) if "language_model" in name}
    assert wanted
    assert set(target_modules_of(lora, base)) == wanted
    peft_config = lora.to_peft("base", wanted)
    written = ("target_modules", "exclude_modules", "layers_to_transform")
    assert adapted_by_peft(**{name: peft_config[name] for name in written}) == wanted


def test_names_become_an_expression_that_ends_with_them(base):
    """vLLM looks for the names of layers in the last group."""
    targets = lora_config_of(2, base, **DEFAULTS, target_modules=("q_proj", "v_proj")).target_modules
    assert targets == r"model\.language_model\b.*\.(q_proj|v_proj)"


def test_all_linear_is_the_text_model_s(base):
    lora = lora_config_of(2, base, **DEFAULTS, target_modules="all-linear")
    assert set(target_modules_of(lora, base)) == set(linear_modules_of(base))
    assert len(linear_modules_of(base)) == 7 * 5


def test_layers_of_the_vision_tower_are_no_targets(base):
    with pytest.raises(ConfigError, match=r"'fc1' matches .* no linear layer|matches no linear layer"):
        lora_config_of(2, base, **DEFAULTS, target_modules=("fc1",))


def test_biases_beside_the_text_model_are_not_trained(base):
    with pytest.raises(UnsupportedError, match=r"bias='all' would train model\.vision_tower.*bias=\"lora_only\""):
        lora_config_of(2, base, **DEFAULTS, target_modules=("q_proj",), bias="all")


# --- adapters and merges ---------------------------------------------------------------------------------------------


def random_adapter(base, **settings):
    lora = lora_config_of(4, base, **DEFAULTS | dict(target_modules=("q_proj", "down_proj")) | settings)
    rng, tensors = np.random.default_rng(2), {}
    for module in target_modules_of(lora, base):
        out, inner = base.tensors[f"{module}.weight"].shape
        tensors[f"{module}.lora_A.weight"] = rng.normal(0, 0.2, (4, inner)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.normal(0, 0.2, (out, 4)).astype(np.float32)
    return Adapter(lora, tensors)


def merged_by_peft(directory, adapter):
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype="auto")
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.mark.parametrize("spelling", ["older", *SPELLINGS])
@pytest.mark.parametrize("files", ["the base's", "several"])
def test_a_merge_is_peft_s_of_the_whole_model_and_leaves_the_rest(spelling, files, directory, tmp_path):
    source = respelled(directory, tmp_path / "base", *SPELLINGS.get(spelling, []))
    base = BaseCheckpoint.open(source)
    adapter = random_adapter(base)
    adapter.write(tmp_path / "adapter", str(source))
    size = None if files == "the base's" else "200KB"
    report = export_with_report(
        base, adapter, str(tmp_path / "out"), "merged", ExportOptions(base_name="b", max_shard_size=size)
    )
    beside = [name for name in base.names if is_beside(base.config, name)]
    note = f"the {len(beside)} tensors of multi_modal_projector, vision_tower are byte for byte the base's"
    assert any(note in one for one in report["notes"])

    merged = BaseCheckpoint.open(tmp_path / "out")
    assert {name: info.stored for name, info in merged.tensors.items()} == {
        name: info.stored for name, info in base.tensors.items()
    }
    assert len(merged.files) == (1 if size is None else len(merged.files))
    assert (len(merged.files) > 1) == (size is not None)
    theirs = merged_by_peft(source, tmp_path / "adapter").state_dict()
    for name in merged.names:
        assert merged.view(name).tobytes() == theirs[name].numpy().tobytes(), name
        if is_beside(base.config, name):
            assert merged.view(name).tobytes() == base.view(name).tobytes(), name
    ours = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(ours) is transformers.Gemma3ForConditionalGeneration
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


SEEING = sorted(MULTIMODAL - {"gemma3"})


def test_the_wrappers_are_those_that_are_merged_here():
    assert {"gemma3", *map(model_type, SEEING)} == WRAPPERS.keys()


@pytest.mark.parametrize("family", SEEING)
def test_an_adapter_and_a_merge_of_every_wrapper_are_peft_s(family, tiny_models, tmp_path):
    base = BaseCheckpoint.open(tiny_models[family])
    adapter = random_adapter(base, target_modules="all-linear")
    adapter.write(tmp_path / "adapter", str(base.directory))
    model = peft.PeftModel.from_pretrained(load(base.directory), tmp_path / "adapter")
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert names == {f"base_model.model.{name[:-7]}.default.weight" for name in adapter.tensors}
    wanted = model.merge_and_unload().state_dict()

    export_with_report(base, adapter, str(tmp_path / "out"), "merged", ExportOptions(base_name="b"))
    found = load(tmp_path / "out").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    merged, plain = BaseCheckpoint.open(tmp_path / "out"), load(base.directory).state_dict()
    beside = [name for name in base.names if is_beside(base.config, name)]
    assert beside
    assert all(merged.view(name).tobytes() == base.view(name).tobytes() for name in beside)
    assert sum(not torch.equal(tensor, plain[name]) for name, tensor in found.items()) == len(adapter.tensors) / 2


@pytest.mark.parametrize("layout", ["adapter", "merged"])
def test_the_card_loads_the_whole_model(layout, base, tmp_path):
    options = ExportOptions(base_name="hf://org/name")
    export_with_report(base, random_adapter(base), str(tmp_path / "out"), layout, options)
    card = (tmp_path / "out" / "README.md").read_text()
    named = "org/name" if layout == "adapter" else "path/to/this/directory"
    assert f'AutoModelForImageTextToText.from_pretrained("{named}"' in card
    assert "CausalLM" not in card


def test_a_cast_merge_keeps_the_names_in_the_files(directory, base, tmp_path):
    adapter = random_adapter(base)
    options = ExportOptions(base_name="b", dtype="bfloat16", max_shard_size="200KB")
    report = export_with_report(base, adapter, str(tmp_path / "out"), "merged", options)
    assert any("multi_modal_projector, vision_tower are the base's, cast to bfloat16" in n for n in report["notes"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load_file(directory / WEIGHTS))
    assert {info.dtype for info in BaseCheckpoint.open(tmp_path / "out").tensors.values()} == {"BF16"}


def older(name):
    return name.replace("model.language_model.", "language_model.model.")


def test_an_adapter_with_names_of_before_is_read(directory, base, tmp_path):
    """As PEFT wrote them with transformers 4: the text model held its decoder, not the decoder the text model."""
    adapter = random_adapter(base, layers_to_transform=[0, 1])
    Adapter(adapter.config, adapter.tensors).write(tmp_path / "newer", str(directory))
    tensors = load_file(tmp_path / "newer" / "adapter_model.safetensors")
    shutil.copytree(tmp_path / "newer", tmp_path / "older")
    save_file({older(n): t for n, t in tensors.items()}, tmp_path / "older" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "older" / "adapter_config.json").read_text())
    plain = {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*vision_tower.*"}
    (tmp_path / "older" / "adapter_config.json").write_text(json.dumps(config | plain))
    read = KerasHubModel.from_preset(str(directory), adapter=str(tmp_path / "older"))
    assert read.adapter.keys() == adapter.tensors.keys()
    assert all((read.adapter[name] == array).all() for name, array in adapter.tensors.items())
    loaded = Adapter.read(tmp_path / "older")
    for out, one in (("a", adapter), ("b", loaded)):
        export_with_report(base, one, str(tmp_path / out), "merged", ExportOptions(base_name="b"))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_an_adapter_that_adapts_the_vision_tower_too_is_not_trained_further(directory, tmp_path):
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"matches model\.vision_tower\..*, beside the text model, which alone is"):
        KerasHubModel.from_preset(str(directory), adapter=str(tmp_path / "adapter"), allow_other_base=True)


def test_an_adapter_of_the_text_model_by_itself_is_refused_with_the_reason(directory, base, tmp_path):
    adapter = random_adapter(base)
    alone = {name.replace("model.language_model.", "model."): array for name, array in adapter.tensors.items()}
    lora = LoraConfig(r=4, target_modules=("q_proj", "down_proj"))
    with pytest.raises(AdapterError, match="one of the two is a multimodal model and the other its text model"):
        Adapter(lora, alone).named_for(base).validate(base)


def test_targets_of_an_adapter_are_checked_in_the_text_model(base):
    lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    check_targets(lora, linear_modules_of(base), other_modules_of(base))


# --- all weights -----------------------------------------------------------------------------------------------------


def test_trained_weights_are_written_beside_the_parts_that_stay(directory, base, tmp_path):
    trained = [name for name in base.names if not is_beside(base.config, name)]
    writer = TrainedWriter(base, trained, "float32", tmp_path)
    for name in trained:
        array = base.view(name) + np.float32(1)
        bounds = tuple((0, size) for size in array.shape)
        writer.put(TensorSlice(name, array.shape, bounds, array, 0, checksum(array)))
    writer.check_complete(1)
    before, after = load_file(directory / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert before.keys() == after.keys()
    for name, array in before.items():
        step = 0 if name.startswith(("vision_tower.", "multi_modal_projector.")) else 1
        assert (after[name] == array + np.float32(step)).all(), name
