"""What `from_preset` makes of PEFT's options, and an adapter that is gone on from; on the driver alone."""

import json
import shutil

import fsspec
import plain_llama
import pytest
from tiny import VOCABULARY, write_model

from kithara_ray import KerasHubModel
from kithara_ray.errors import AdapterError, CheckpointError, ConfigError, UnsupportedError
from kithara_ray.hf.adapter import Adapter, target_modules_of
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig

LINEAR = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


@pytest.fixture
def directory(tiny_models):
    return str(tiny_models["llama"])


@pytest.fixture
def adapter(directory, tmp_path):
    """An adapter of PEFT's own making, B not zero."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = PeftConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_options_reach_the_configuration(directory):
    model = KerasHubModel.from_preset(
        directory,
        lora_rank=8,
        lora_alpha=20,
        lora_dropout=0.1,
        target_modules="all-linear",
        rank_pattern={"q_proj": 4},
        alpha_pattern={"v_proj": 2},
        init_lora_weights="gaussian",
    )
    assert model.lora == LoraConfig(
        r=8,
        lora_alpha=20,
        lora_dropout=0.1,
        target_modules=LINEAR,
        rank_pattern={"q_proj": 4},
        alpha_pattern={"v_proj": 2},
        init_lora_weights="gaussian",
    )


def test_a_base_s_own_dropout_is_accepted_and_told(tmp_path, caplog):
    base = plain_llama.write(tmp_path / "base", attention_dropout=0.1)
    KerasHubModel.from_preset(str(base), lora_rank=2)
    assert f"{base}: config.json: attention_dropout=0.1: off in training here" in caplog.text


def test_options_beside_the_factors_reach_the_configuration(directory):
    """Spelled out as PEFT understands them for a base whose head is its embedding."""
    fields = {"lora_rank": 8, "ensure_weight_tying": True, "layers_to_transform": 1, "layers_pattern": "layers"}
    model = KerasHubModel.from_preset(directory, modules_to_save=["lm_head"], **fields)
    assert model.lora.modules_to_save == ("embed_tokens",)
    assert (model.lora.layers_to_transform, model.lora.layers_pattern) == ((1,), ("layers",))
    tokens = {"embed_tokens": [5, 4], "lm_head": [5, 4]}
    model = KerasHubModel.from_preset(directory, lora_rank=8, trainable_token_indices=tokens, exclude_modules="lm_head")
    assert model.lora.trainable_token_indices == {"embed_tokens": (5, 4)}
    for settings, message in (
        ({"bias": "all"}, "bias='all': none of these layers has a bias in this base; leave it out"),
        ({"trainable_token_indices": [VOCABULARY]}, f"token {VOCABULARY} of 'embed_tokens' is beyond the base's"),
        ({"modules_to_save": ["embed_tokens"]}, "train the two separately; give ensure_weight_tying=True"),
        ({"layers_to_transform": [3]}, "no layer 3; this model has layers 0 to 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            KerasHubModel.from_preset(directory, lora_rank=8, **settings)
        with pytest.raises(ConfigError, match="without lora_rank="):
            KerasHubModel.from_preset(directory, **settings)


@pytest.fixture(scope="module")
def adapted_by_peft(tiny_models):
    """The names of the modules that PEFT adapts for `target_modules`; raises what PEFT raises."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    def adapted(targets):
        base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
        model = get_peft_model(base, PeftConfig(r=2, target_modules=targets))
        return {name for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}

    return adapted


TARGETS = ["all-linear", ["q_proj", "up_proj"], ["layers.1.mlp.up_proj", "2.self_attn.k_proj", "down_proj"]]
TARGETS += [r".*\.(q|v)_proj", r"model\.layers\.[02]\..*_proj", r".*(?<!o)_proj"]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_are_those_of_peft_and_recorded_so(targets, directory, adapted_by_peft):
    base, model = BaseCheckpoint.open(directory), KerasHubModel.from_preset(directory, 2, target_modules=targets)
    adapted = adapted_by_peft(targets)
    assert set(target_modules_of(model.lora, base)) == adapted
    recorded = model.lora.to_peft("base", adapted)["target_modules"]
    assert adapted_by_peft(recorded) == adapted


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], r"lm_head|.*q_proj", r".*mlp.*", r".*\.[qv]"], ids=str)
def test_targets_that_peft_refuses_or_that_are_not_linear_are_refused(targets, directory, adapted_by_peft):
    with pytest.raises(ConfigError, match=r"target_modules: .* matches .*(an embedding|no linear layer)"):
        KerasHubModel.from_preset(directory, 2, target_modules=targets)
    if "embed_tokens" not in targets and "lm_head" not in targets:
        with pytest.raises(ValueError, match=r"not supported|not found"):
            adapted_by_peft(targets)


def test_one_name_may_be_a_string_and_whole_modules_are_not_trained(directory):
    assert KerasHubModel.from_preset(directory, 2, target_modules="q_proj").lora.target_modules == ("q_proj",)
    with pytest.raises(ConfigError, match="'sharding_strategy': give Trainer"):
        KerasHubModel.from_preset(directory, 2, sharding_strategy="fsdp")


def test_an_adapter_of_peft_whose_targets_are_a_regular_expression(directory, adapter):
    rewrite(adapter, target_modules=r".*(self_attn\.q|mlp\.up)_proj")
    model = KerasHubModel.from_preset(directory, adapter=str(adapter))
    assert model.lora.matches("model.layers.2.mlp.up_proj")
    rewrite(adapter, target_modules=r".*self_attn\.q_proj")
    with pytest.raises(AdapterError, match=r"up_proj: not a target of target_modules='\.\*self_attn"):
        KerasHubModel.from_preset(directory, adapter=str(adapter))


def test_an_adapter_of_peft_brings_its_settings_and_tensors(directory, adapter):
    model = KerasHubModel.from_preset(directory, adapter=str(adapter))
    written = Adapter.read(adapter)
    assert (model.lora.r, model.lora.alpha, model.lora.target_modules) == (4, 6, ("q_proj", "up_proj"))
    assert model.adapter.keys() == written.tensors.keys()
    assert all((model.adapter[name] == tensor).all() for name, tensor in written.tensors.items())
    assert any(tensor.any() for name, tensor in model.adapter.items() if "lora_B" in name)


def test_no_weight_of_a_remote_base_comes_to_the_driver(directory, tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.put(directory, "/preset", recursive=True)
    monkeypatch.setenv("KITHARA_RAY_CACHE", str(tmp_path / "cache"))
    model = KerasHubModel.from_preset("memory://preset", lora_rank=4, target_modules="all-linear")
    assert model.lora.target_modules == LINEAR
    (weights,) = (tmp_path / "cache").rglob("*.safetensors")
    assert weights.stat().st_size > 500_000
    assert weights.stat().st_blocks * 512 < 65_536
    fs.rm("/preset", recursive=True)


def rewrite(adapter, **fields):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_adapter_of_another_base_is_refused(directory, adapter, tmp_path):
    rewrite(adapter, base_model_name_or_path="org/another-model")
    with pytest.raises(AdapterError, match=r"was trained on 'org/another-model' and not on .*allow_other_base=True"):
        KerasHubModel.from_preset(directory, adapter=str(adapter))
    assert KerasHubModel.from_preset(directory, adapter=str(adapter), allow_other_base=True).adapter
    other = write_model(tmp_path / "other", "llama", num_hidden_layers=2)
    with pytest.raises(AdapterError, match=r"model\.layers\.2\..*the base at .* has no tensor"):
        KerasHubModel.from_preset(str(other), adapter=str(adapter), allow_other_base=True)


def test_a_base_whose_files_disagree_is_refused_before_a_run(tmp_path):
    """Whatever is trained: tests/model/test_family_tensors.py has the cases."""
    fewer = str(plain_llama.write(tmp_path / "fewer", num_hidden_layers=3))
    own_head = str(plain_llama.write(tmp_path / "own_head", tie_word_embeddings=True))
    adapter = str(plain_llama.adapter(tmp_path / "lora", own_head))
    for how in ({"lora_rank": 2}, {"lora_rank": None}, {"adapter": adapter}):
        with pytest.raises(CheckpointError, match=r"tensors are missing of the 30 that config\.json gives"):
            KerasHubModel.from_preset(fewer, **how)
        with pytest.raises(CheckpointError, match="ties the head to the embedding"):
            KerasHubModel.from_preset(own_head, **how)


def test_an_adapter_of_the_same_names_and_other_weights_is_refused(tmp_path):
    right, other = (str(plain_llama.write(tmp_path / str(seed) / "base", seed)) for seed in (0, 1))
    adapter = str(plain_llama.adapter(tmp_path / "lora", right))
    assert KerasHubModel.from_preset(right, adapter=adapter).adapter
    with pytest.raises(AdapterError, match=r"fingerprint .*allow_other_base=True"):
        KerasHubModel.from_preset(other, adapter=adapter)
    assert KerasHubModel.from_preset(other, adapter=adapter, allow_other_base=True).adapter


def test_what_cannot_be_honoured_is_named(directory, adapter):
    with pytest.raises(ConfigError, match="lora_rank=8 with adapter=: the adapter has its own"):
        KerasHubModel.from_preset(directory, lora_rank=8, adapter=str(adapter))
    with pytest.raises(UnsupportedError, match="init_lora_weights=False"):
        KerasHubModel.from_preset(directory, lora_rank=8, init_lora_weights=False)
    rewrite(adapter, use_dora=True)
    with pytest.raises(AdapterError, match=r"lora_magnitude_vector is missing, but .*lora_A.weight is present"):
        KerasHubModel.from_preset(directory, adapter=str(adapter))
    rewrite(adapter, use_dora=False, fan_in_fan_out=True)
    with pytest.raises(UnsupportedError, match="fan_in_fan_out=True is not supported"):
        KerasHubModel.from_preset(directory, adapter=str(adapter))
    shutil.rmtree(adapter)
    with pytest.raises(Exception, match="adapter") as caught:
        KerasHubModel.from_preset(directory, adapter=str(adapter))
    assert type(caught.value).__module__ == "kithara_ray.errors"


def test_rows_for_added_tokens(directory, tmp_path):
    added = [VOCABULARY + 2]
    with pytest.raises(ConfigError, match=r"token 322 .* beyond the base's 320 rows. Add rows with resize_token_"):
        KerasHubModel.from_preset(directory, lora_rank=4, trainable_token_indices=added)
    with pytest.raises(ConfigError, match=r"resize_token_embeddings=300: the base has 320 rows, .* leave it out"):
        KerasHubModel.from_preset(directory, lora_rank=4, resize_token_embeddings=300)
    with pytest.raises(ConfigError, match=r"resize_token_embeddings=330.* without lora_rank="):
        KerasHubModel.from_preset(directory, resize_token_embeddings=330)
    as_it_is = KerasHubModel.from_preset(directory, lora_rank=4, resize_token_embeddings=VOCABULARY)
    assert as_it_is.lora == KerasHubModel.from_preset(directory, lora_rank=4).lora
    settings = dict(trainable_token_indices=added, resize_token_embeddings=VOCABULARY + 3)
    model = KerasHubModel.from_preset(directory, lora_rank=4, **settings)
    assert (model.lora.resize_token_embeddings, model.lora.added_rows) == (VOCABULARY + 3, None)


def test_a_resized_adapter_of_peft_brings_its_rows(directory, tmp_path):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory)
    base.resize_token_embeddings(VOCABULARY + 3)
    with pytest.warns(UserWarning, match="has been resized"):
        get_peft_model(base, PeftConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = KerasHubModel.from_preset(directory, adapter=str(tmp_path))
    assert model.lora.resize_token_embeddings == VOCABULARY + 3
    rows = base.get_input_embeddings().weight.detach().numpy()[VOCABULARY:]
    assert (model.lora.added_rows.values["model.embed_tokens.weight"] == rows).all()
    assert set(model.adapter) == {f"model.layers.{n}.self_attn.q_proj.lora_{x}.weight" for n in range(3) for x in "AB"}
    recorded = json.loads(json.dumps(model.lora.recorded()))
    assert recorded["added_rows"] == model.lora.added_rows.digest
    assert "added_rows" not in LoraConfig().recorded()
