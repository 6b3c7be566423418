"""A base with rows for added tokens, as transformers resizes it; its adapters as PEFT reads, merges and saves them."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny import long_unless, mostly_long

from kithara_ray.errors import AdapterError, ConfigError, ExportError, UnsupportedError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout, export
from kithara_ray.hf.exports.proof import prove_adapter
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.merging.combine import combine
from kithara_ray.hf.resizing import tables
from kithara_ray.hf.resizing.added import AddedRows
from kithara_ray.hf.resizing.saved import saved_tables

OLD, NEW = 96, 101
SIZES = dict(vocab_size=OLD, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
IDS = torch.tensor([[1, 97, 5, 100, 98, 95, 2, 99]])
BOTH = ["embed_tokens", "lm_head"]
# tied or not, and what is trained of the tables.
CASES = {
    "factors, tied": (True, {}),
    "factors": (False, {}),
    "tokens, tied": (True, dict(trainable_token_indices=[97, 5, 100])),
    "tokens of both": (False, dict(trainable_token_indices={"embed_tokens": [97, 5], "lm_head": [100]})),
    "whole, tied": (True, dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "whole": (False, dict(modules_to_save=BOTH)),
    "the head and tokens": (False, dict(modules_to_save=["lm_head"], trainable_token_indices=[100, 3])),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KITHARA_RAY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(tied, dtype) -> a small qwen2, its weights in several files."""
    made = {}
    for tied in (True, False):
        torch.manual_seed(3)
        config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
        model = transformers.Qwen2ForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.05, std=0.2)
        for dtype in ("float32", "bfloat16"):
            made[tied, dtype] = tmp_path_factory.mktemp(f"{tied}-{dtype}")
            model.to(getattr(torch, dtype)).save_pretrained(made[tied, dtype], max_shard_size="60KB")
    return made


def with_rows(directory, mean=True):
    """transformers' resized model; its new rows are random, or the mean of the old ones."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    model.resize_token_embeddings(NEW, mean_resizing=False)
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()} if mean else ():
        weight = layer.weight.data
        weight[OLD:] = weight[:OLD].double().mean(dim=0).float().to(weight.dtype)
    return model


def random_adapter(base, fields):
    """Random values for all that such an adapter of the base holds."""
    config = LoraConfig(r=4, lora_alpha=6, resize_token_embeddings=NEW, **fields)
    big, rng = tables.resized(base, config), np.random.default_rng(0)
    shapes = {}
    for module in (
        name.removesuffix(".weight") for name in big.names if name.endswith((".q_proj.weight", "v_proj.weight"))
    ):
        rows, columns = big.tensors[module + ".weight"].shape
        shapes |= {module + ".lora_A.weight": (4, columns), module + ".lora_B.weight": (rows, 4)}
    for module, name in (("model.embed_tokens", "embed_tokens"), ("lm_head", "lm_head")):
        if name in config.modules_to_save:
            shapes[module + ".weight"] = (NEW, 64)
        if name in config.trainable_token_indices:
            shapes[module + ".token_adapter.trainable_tokens_delta"] = (len(config.trainable_token_indices[name]), 64)
    return Adapter(config, {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()})


def loaded(model, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected keys are warnings in peft
        return peft.PeftModel.from_pretrained(model, directory)


def bits(model):
    made = {name: tensor for name, tensor in model.state_dict().items()}
    return {name: tensor.float().numpy() for name, tensor in made.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_base_is_transformers_with_mean_rows(tied, dtype, bases):
    base = BaseCheckpoint.open(bases[tied, dtype])
    config = LoraConfig(resize_token_embeddings=NEW)
    big, expected = tables.resized(base, config), bits(with_rows(base.directory))
    assert big.config == {**base.config, "vocab_size": NEW}
    assert base.config["vocab_size"] == OLD
    assert_same({name: np.float32(big.view(name)) for name in big.names}, {n: expected[n] for n in base.names})
    assert len(np.unique(np.float32(big.view("model.embed_tokens.weight"))[OLD:], axis=0)) == 1
    shapes = tables.described(base, config)
    assert {i.name: i.shape for i in shapes.tensors.values()} == {i.name: i.shape for i in big.tensors.values()}
    assert big.fingerprint() not in (
        base.fingerprint(),
        tables.resized(base, LoraConfig(resize_token_embeddings=99)).fingerprint(),
    )


def test_a_host_writes_the_tables_once_and_only_them(bases, tmp_path, monkeypatch):
    base, config = BaseCheckpoint.open(bases[False, "bfloat16"]), LoraConfig(resize_token_embeddings=NEW)
    tables.resized(base, config)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2 * (NEW * 64 * 2 + 400)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_write", None)
        assert tables.resized(base, config).fingerprint()
    other = LoraConfig(
        resize_token_embeddings=NEW, added_rows=AddedRows({"lm_head.weight": np.ones((5, 64), np.float32)})
    )
    assert (tables.resized(base, other).view("lm_head.weight")[OLD:] == 1).all()
    assert (tables.resized(base, config).view("lm_head.weight")[OLD:] != 1).all()


SHORT = {("tokens, tied", "bfloat16"), ("the head and tokens", "float32")}


@pytest.mark.parametrize(
    ("case", "dtype"),
    long_unless(lambda *case: case in SHORT, [(case, dtype) for case in CASES for dtype in ("float32", "bfloat16")]),
)
def test_an_adapter_of_a_resized_base_is_peft_s(case, dtype, bases, tmp_path):
    """PEFT loads it after `resize_token_embeddings`, merges it to the same bits, and it reads back as it was."""
    tied, fields = CASES[case]
    base = BaseCheckpoint.open(bases[tied, dtype])
    adapter = random_adapter(base, fields)
    for layout in Layout:
        export(base, adapter, str(tmp_path / layout), layout, base_name=str(base.directory))

    tuned = loaded(with_rows(base.directory, mean=False), tmp_path / "adapter")
    beside = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "separate", dtype="auto")
    assert_same(bits(beside), bits(with_rows(base.directory)))
    beside = loaded(beside, tmp_path / "separate" / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.config.vocab_size == NEW
    if tied:
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad():
        logits = tuned(IDS).logits
        assert torch.equal(beside(IDS).logits, logits)
        assert (logits - with_rows(base.directory)(IDS).logits).abs().max() > 0.05
    assert_same(bits(merged), bits(tuned.merge_and_unload()))

    read = Adapter.read(tmp_path / "adapter").fitted(base)
    assert read.config.resize_token_embeddings == NEW
    assert_same(read.tensors, adapter.tensors)


@pytest.mark.parametrize("case", mostly_long(["whole, tied", "tokens of both, tied"], [*CASES, "tokens of both, tied"]))
def test_an_adapter_that_peft_saved_of_a_resized_base_is_read_and_merged(case, bases, tmp_path):
    """Its new rows are transformers' random ones, which the adapter brings."""
    of_both = dict(trainable_token_indices={"embed_tokens": [97, 5], "lm_head": [97, 5]})
    tied, fields = CASES.get(case, (True, of_both))
    base = BaseCheckpoint.open(bases[tied, "bfloat16"])
    torch.manual_seed(5)
    model = with_rows(base.directory, mean=False)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **fields))
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.requires_grad:
            parameter.data += 0.5
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        made.save_pretrained(tmp_path / "peft")

    adapter = Adapter.read(tmp_path / "peft").fitted(base)
    assert adapter.config.resize_token_embeddings == NEW
    for layout in (Layout.MERGED, Layout.ADAPTER):
        export(base, adapter, str(tmp_path / layout), layout, base_name=str(base.directory))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    with torch.no_grad():
        again = loaded(with_rows(base.directory, mean=False), tmp_path / "adapter")
        assert torch.equal(again(IDS).logits, made(IDS).logits)
    assert_same(bits(merged), bits(made.merge_and_unload()))


def test_what_does_not_fit_is_refused(bases, tmp_path):
    base = BaseCheckpoint.open(bases[False, "float32"])
    with pytest.raises(ConfigError, match="resize_token_embeddings=90: the base has 96 rows"):
        tables.resized(base, LoraConfig(resize_token_embeddings=90))
    with pytest.raises(ConfigError, match=r"must be the number of rows.*got 0"):
        LoraConfig(resize_token_embeddings=0)
    own = BaseCheckpoint(base.directory, base.config | {"hidden_size_per_layer_input": 4}, base.tensors, base.files)
    with pytest.raises(UnsupportedError, match="embeddings of its own, to which transformers adds no rows"):
        tables.described(own, LoraConfig(resize_token_embeddings=99))
    adapter = random_adapter(base, {})
    export(base, adapter, str(tmp_path / "a"), Layout.ADAPTER, base_name=str(base.directory))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors, table = load_file(file), "base_model.model.lm_head.weight"

    def given(changed, message, kind=AdapterError):
        save_file({n: a for n, a in (tensors | changed).items() if a is not None}, file, {"format": "pt"})
        with pytest.raises(kind, match=message):
            Adapter.read(tmp_path / "a").fitted(base).validate(base)

    given({table: tensors[table] + 1}, "lm_head.weight: .*other values in the base's 96 rows")
    given({table: tensors[table][:99]}, "lm_head.weight: .*has 99 rows of it, other tables have 101, the base 96")
    fewer = {name: array[:90] for name, array in tensors.items() if array.shape == (NEW, 64)}
    given(fewer, "has 90 rows of it, other tables have 90, the base 96. Only")
    copy = table.replace("lm_head", "model.embed_tokens.modules_to_save")
    given(
        {copy: tensors[table]}, "modules_to_save.weight differs from model.embed_tokens.weight, of which it is a copy"
    )
    save_file(tensors | {table: tensors[table] * 2}, file, {"format": "pt"})
    given_tables = saved_tables(adapter.config, base)
    with pytest.raises(ExportError, match=r"lm_head.weight of the resized base reads back different"):
        prove_adapter(tmp_path / "a", adapter, given_tables)
    with pytest.raises(UnsupportedError, match="added tokens cannot be combined"):
        combine([Adapter.read(tmp_path / "a")] * 2, [1, 1])


def test_a_file_without_a_table_is_said(bases, tmp_path, caplog):
    """As PEFT writes it with save_embedding_layers=False: transformers' random rows are lost with it."""
    base = BaseCheckpoint.open(bases[False, "float32"])
    fields = dict(modules_to_save=["embed_tokens"])
    export(base, random_adapter(base, fields), str(tmp_path / "a"), Layout.ADAPTER, base_name=str(base.directory))
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n: a for n, a in load_file(file).items() if "lm_head" not in n}, file, {"format": "pt"})
    assert Adapter.read(tmp_path / "a").fitted(base).config.resize_token_embeddings == NEW
    assert "lm_head.weight: the adapter's file has no values for the 5 added rows" in caplog.text


def test_tables_that_peft_saves_of_a_base_as_it_is_are_no_resize(bases, tmp_path):
    base = BaseCheckpoint.open(bases[True, "float32"])
    model = transformers.AutoModelForCausalLM.from_pretrained(base.directory)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    made.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = Adapter.read(tmp_path)
    assert adapter.tables
    adapter = adapter.fitted(base)
    adapter.validate(base)
    assert (adapter.tables, adapter.config.resize_token_embeddings, adapter.config.added_rows) == ({}, None, None)


def test_card_and_notes_say_how_such_an_adapter_is_loaded(bases, tmp_path):
    base = BaseCheckpoint.open(bases[False, "float32"])
    export(base, random_adapter(base, {}), str(tmp_path / "a"), Layout.ADAPTER, base_name=str(base.directory))
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"base.resize_token_embeddings({NEW})" in card
    notes = json.loads((tmp_path / "a" / "export_report.json").read_text())["notes"]
    assert any(f"the embedding has {NEW} rows: PEFT loads the adapter on a base" in note for note in notes)
