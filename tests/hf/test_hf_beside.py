"""What an adapter holds beside its factors: files of PEFT are read, merged as PEFT merges them, written as it reads."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from kithara_ray.errors import AdapterError, ConfigError, ExportError, UnsupportedError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.beside import normal
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout, export
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.hf.merging.changes import changes_of
from kithara_ray.hf.merging.combine import combine
from kithara_ray.hf.merging.merge import check_mergeable

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
EACH = ["embed_tokens", "lm_head"]
APART = {"embed_tokens": [5, 2], "lm_head": [5, 95]}
# tied or not, and what is trained; qwen2's q, k and v have biases.
CASES = {
    "biases": (True, dict(bias="all")),
    "biases of targets": (True, dict(bias="lora_only", layers_to_transform=1)),
    "a bias of B": (True, dict(lora_bias=True, target_modules=["q_proj", "k_proj"])),
    "both biases": (False, dict(bias="all", lora_bias=True, target_modules=["q_proj", "k_proj"], use_rslora=True)),
    "tokens of a tied table": (True, dict(trainable_token_indices=[90, 3, 17])),
    "tokens apart": (False, dict(trainable_token_indices=APART)),
    "both tables": (False, dict(modules_to_save=EACH)),
    "a tied table": (True, dict(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "a head, tokens, biases": (False, dict(modules_to_save=["lm_head"], trainable_token_indices=[1, 3], bias="all")),
}
TIED = {True: CASES["tokens of a tied table"][1], False: CASES["both tables"][1]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(tied, dtype) -> a small qwen2, its weights in several files."""
    made = {}
    for tied in (True, False):
        torch.manual_seed(3)
        config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
        model = transformers.Qwen2ForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        for dtype in ("float32", "bfloat16"):
            made[tied, dtype] = tmp_path_factory.mktemp(f"{tied}-{dtype}")
            model.to(getattr(torch, dtype)).save_pretrained(made[tied, dtype], max_shard_size="60KB")
    return made


def plain(directory, dtype="auto"):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def save(base, directory, **fields):
    """An adapter as PEFT saves it, everything in it moved."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **fields}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(plain(base), peft.LoraConfig(**fields))
        with torch.no_grad():
            for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_merged_bit_by_bit_as_peft_s_and_written_as_peft_reads(bases, tmp_path, case, dtype):
    tied, fields = CASES[case]
    base = BaseCheckpoint.open(bases[tied, dtype])
    save(base.directory, tmp_path / "peft", **fields)
    read = Adapter.read(tmp_path / "peft")
    export(base, read, str(tmp_path / "merged"), Layout.MERGED, base_name=str(base.directory))
    export(base, read, str(tmp_path / "both"), Layout.SEPARATE, base_name=str(base.directory))

    for directory in (tmp_path / "peft", tmp_path / "both" / "adapter"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # missing or unexpected keys are warnings in peft
            loaded = peft.PeftModel.from_pretrained(plain(base.directory), directory)
        reference = loaded.merge_and_unload().state_dict()
        merged, changed = BaseCheckpoint.open(tmp_path / "merged"), set()
        for name in merged.names:
            theirs = reference[name].contiguous().view(torch.uint8).numpy().tobytes()
            assert merged.view(name).tobytes() == theirs, (directory, name)
            changed |= {name} if theirs != base.view(name).tobytes() else set()
        assert changed == set(changes_of(read, base.names))
        if tied:
            assert torch.equal(reference["lm_head.weight"], reference["model.embed_tokens.weight"])
    written = load_file(tmp_path / "both" / "adapter" / "adapter_model.safetensors")
    assert written.keys() == load_file(tmp_path / "peft" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cast_values_are_rounded_once(bases, tmp_path, dtype):
    """As PEFT's on a base that is loaded in that dtype; a float16 of a bfloat16 base is another number."""
    base = BaseCheckpoint.open(bases[False, "bfloat16"])
    save(base.directory, tmp_path / "peft", modules_to_save=EACH, bias="all")
    tensors = {
        n: np.asarray(a, np.float32) + np.float32(1e-4) for n, a in Adapter.read(tmp_path / "peft").tensors.items()
    }
    adapter = Adapter(Adapter.read(tmp_path / "peft").config, tensors)
    export(base, adapter, str(tmp_path / "merged"), Layout.MERGED, base_name="base", dtype=dtype)
    merged = BaseCheckpoint.open(tmp_path / "merged")
    for name, array in adapter.beside.items():
        np.testing.assert_array_equal(merged.view(name.replace(".base_layer", "")), array.astype(dtype))


def test_a_proof_sees_a_wrong_value(bases, tmp_path, monkeypatch):
    from kithara_ray.hf.merging import merge

    for tied, fields in TIED.items():
        base = BaseCheckpoint.open(bases[tied, "float32"])
        save(base.directory, tmp_path / f"{tied}", **fields)
        adapter = Adapter.read(tmp_path / f"{tied}")
        right = merge._replaced

        def wrong(w_OI, begin, change, out_dtype, right=right):
            made = right(w_OI, begin, change, out_dtype).copy()
            made[7, 3] *= 1.001  # of no trained token in the tied base
            return made

        monkeypatch.setattr(merge, "_replaced", wrong)
        with pytest.raises(ExportError, match=r"(embed_tokens|lm_head).weight\[7, 3\]: the written file holds"):
            export(base, adapter, str(tmp_path / f"out-{tied}"), Layout.MERGED, base_name="base")
        monkeypatch.setattr(merge, "_replaced", right)


def test_what_peft_would_train_apart_is_refused_by_name(bases):
    tied, untied = (BaseCheckpoint.open(bases[tied, "float32"]) for tied in (True, False))
    for base, fields, kind, message in [
        (
            tied,
            dict(modules_to_save=["lm_head"]),
            UnsupportedError,
            "train the two separately; give ensure_weight_tying=True",
        ),
        (tied, dict(trainable_token_indices={"lm_head": [1]}), UnsupportedError, "give one list for both"),
        (
            tied,
            dict(trainable_token_indices=APART),
            UnsupportedError,
            "'lm_head' lists other tokens than",
        ),
        (untied, dict(ensure_weight_tying=True), ConfigError, "this base does not tie its head to its embedding"),
        (
            untied,
            dict(trainable_token_indices=[96]),
            ConfigError,
            "token 96 .* beyond the base's 96 rows.*resize_",
        ),
    ]:
        with pytest.raises(kind, match=message):
            normal(LoraConfig(**fields), base)
    both = normal(LoraConfig(trainable_token_indices={"embed_tokens": [1], "lm_head": [1]}), tied)
    assert both["trainable_token_indices"] == {"embed_tokens": (1,)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "some"}, "bias must be one of"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias=True cannot be combined with use_dora=True"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias=True needs init_lora_weights=True"),
        ({"modules_to_save": ["norm"]}, "'norm' is neither 'embed_tokens' nor 'lm_head'"),
        ({"trainable_token_indices": {"wte": [1]}}, "'wte' is neither"),
        ({"trainable_token_indices": []}, "must list the ids of tokens"),
        ({"trainable_token_indices": [-1]}, "must list the ids of tokens, >= 0"),
        ({"trainable_token_indices": [1, 1]}, "an id of embed_tokens is given twice"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "modules_to_save trains all of embed",
        ),
    ],
)
def test_wrong_settings_fail_where_they_are_written(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_a_file_that_does_not_fit_its_config_is_refused(bases, tmp_path):
    base = BaseCheckpoint.open(bases[True, "float32"])
    save(base.directory, tmp_path, bias="all", **CASES["a tied table"][1])
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())

    def given(message, kind=AdapterError, without="", **changed):
        config.write_text(json.dumps({**fields, **changed}))
        save_file({n: a for n, a in tensors.items() if not without or without not in n}, weights, {"format": "pt"})
        with pytest.raises(kind, match=message):
            Adapter.read(tmp_path).fitted(base).validate(base)

    given(r"k_proj.bias: adapter_config.json says bias='none', which does not name it", bias="none")
    given(r"embed_tokens.weight: .* other values in the base's 96 rows, .*not say that", modules_to_save=None)
    given(r"layers.1.self_attn.k_proj.bias is missing \(1 such", without="layers.1.self_attn.k_proj.bias")
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    given("lm_head.weight: ensure_weight_tying ties it to the embedding, but their values differ")


def test_a_bias_of_b_has_no_place_in_a_layer_without_bias(base, make_adapter, tmp_path):
    adapter = make_adapter(base)
    adapter = Adapter(LoraConfig(**{**vars(adapter.config), "lora_bias": True}), dict(adapter.tensors))
    adapter.tensors |= {f"{m}.lora_B.bias": np.ones(len(adapter.b(m)), np.float32) for m in adapter.modules}
    adapter.validate(base)
    with pytest.raises(UnsupportedError, match=r"q_proj.bias: the base has no such bias that lora_bias could"):
        check_mergeable(base, adapter)
    export(base, adapter, str(tmp_path / "adapter"), Layout.ADAPTER, base_name="base")
    with pytest.raises(UnsupportedError, match="biases, trained tokens, saved modules or added tokens cannot be"):
        combine([adapter, adapter], [1, 1])


def test_new_tokens_are_trained_on_a_resized_base(bases, tmp_path):
    """As docs/lora.md has it: transformers resizes, and the adapter holds the new rows that are trained."""
    before = BaseCheckpoint.open(bases[True, "float32"])
    model = plain(before.directory)
    model.resize_token_embeddings(99)
    model.save_pretrained(tmp_path / "resized")
    base = BaseCheckpoint.open(tmp_path / "resized")
    table = base.view("model.embed_tokens.weight")
    np.testing.assert_array_equal(table[:96], before.view("model.embed_tokens.weight"))
    save(base.directory, tmp_path / "peft", trainable_token_indices=[98, 96])
    export(base, Adapter.read(tmp_path / "peft"), str(tmp_path / "merged"), Layout.MERGED, base_name="base")
    merged = plain(tmp_path / "merged")
    trained = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    rows = trained["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    expected = np.array(table)
    expected[[98, 96]] = rows
    np.testing.assert_array_equal(merged.lm_head.weight.detach().numpy(), expected)
    assert not np.array_equal(expected, table)
