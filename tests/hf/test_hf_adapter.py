import json
import warnings

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from peft.utils.other import get_pattern_key

from kithara_ray.errors import AdapterError, CheckpointError, ConfigError, UnsupportedError
from kithara_ray.hf.adapter import Adapter, LoraConfig
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.merging.combine import combine

Q = "model.layers.0.self_attn.q_proj"
PATTERNS = {"rank_pattern": {r"layers\.0\..*q_proj": 2, "v_proj": 6}, "alpha_pattern": {r"1\.self_attn\.v_proj": 3}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "lora_rank must be >= 1, got 0"),
        ({"r": True}, "lora_rank must be >= 1, got True"),
        ({"r": 2.5}, "lora_rank must be >= 1, got 2.5"),
        ({"lora_alpha": 0}, "lora_alpha must be finite and > 0, got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be finite and > 0, got nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"target_modules": ()}, "target_modules must name at least one module"),
        ({"target_modules": ""}, "target_modules must name at least one module"),
        ({"target_modules": "(q_proj"}, r"target_modules: '\(q_proj' is not a regular expression"),
        ({"target_modules": "All-Linear"}, 'spell out the modules that "all-linear" stands for'),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be >= 1, got 0"),
        ({"rank_pattern": {"(": 2}}, "is not a regular expression"),
        ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\] must be finite and > 0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
    ],
)
def test_config_fails_where_it_is_written(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_alpha_defaults_to_the_rank():
    assert LoraConfig(r=8).scale_of(Q) == 1.0
    assert LoraConfig(r=4, lora_alpha=10).scale_of(Q) == 2.5
    assert LoraConfig(r=4, lora_alpha=10, use_rslora=True).scale_of(Q) == 5.0


def test_targets_are_whole_names_between_dots():
    config = LoraConfig(target_modules=("q_proj", "0.mlp.up_proj"))
    names = ("q_proj", Q, "layers.0.mlp.up_proj", "xq_proj", "layers.10.mlp.up_proj", "q_proj.x", "a.qkv_q_proj")
    assert [config.matches(name) for name in names] == [True, True, True, False, False, False, False]


def test_a_string_of_targets_is_a_regular_expression_over_the_whole_name():
    config = LoraConfig(target_modules=r".*\.[01]\..*(q|up)_proj")
    names = (Q, "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj", f"{Q}.x", "q_proj")
    assert [config.matches(name) for name in names] == [True, True, False, False, False]
    assert config.to_peft("b", found=[Q])["target_modules"] == config.target_modules
    assert LoraConfig.from_peft(config.to_peft("b")).target_modules == config.target_modules


def test_patterns_mean_what_they_mean_in_peft(make_base):
    """The scales and ranks of every module, as peft sets them up."""
    fields = {"r": 4, "lora_alpha": 10, **PATTERNS}
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(make_base()),
        peft.LoraConfig(target_modules=["q_proj", "0.self_attn.v_proj", "1.self_attn.v_proj"], **fields),
    )
    ours = LoraConfig(target_modules=("q_proj", "0.self_attn.v_proj", "1.self_attn.v_proj"), **fields)
    adapted = set()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            adapted.add(name)
            assert ours.rank_of(name) == layer.r["default"], name
            assert ours.scale_of(name) == layer.scaling["default"], name
    linear = {n.removesuffix(".weight") for n in BaseCheckpoint.open(make_base()).names}
    assert {name for name in linear if ours.matches(name)} == adapted
    assert len({ours.rank_of(name) for name in adapted}) == 3


@pytest.mark.parametrize("name", ["a.q_proj", "q_proj", "xq_proj", "a.q_proj.b", "a.b.q_proj"])
@pytest.mark.parametrize("key", ["q_proj", "a.q_proj", ".*q_proj", "b|q_proj", r"(a\.)?q_proj"])
def test_pattern_key_against_peft(name, key):
    reference = {key: 3}.get(get_pattern_key([key], name), 9)
    assert LoraConfig(r=9, rank_pattern={key: 3}).rank_of(name) == reference


def test_peft_round_trip():
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=("q_proj", "v_proj"), lora_dropout=0.1, use_rslora=True, **PATTERNS
    )
    assert LoraConfig.from_peft(config.to_peft("org/name")) == config
    reference = peft.LoraConfig(**config.to_peft("org/name", revision="abc")).to_dict()
    assert reference["base_model_name_or_path"] == "org/name"
    assert reference["revision"] == "abc"
    assert (reference["task_type"], reference["inference_mode"]) == ("CAUSAL_LM", True)
    assert config.to_peft("b")["lora_alpha"].__class__ is int


def test_every_peft_default_is_accepted_and_every_foreign_field_refused():
    default = json.loads(json.dumps(peft.LoraConfig(r=4, target_modules=["q_proj"]).to_dict(), default=list))
    assert LoraConfig.from_peft(default) == LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj",))
    foreign = {
        "fan_in_fan_out": True,
        "layer_replication": [[0, 1]],
        "alora_invocation_tokens": [1], "use_qalora": True, "qalora_group_size": 32, "kasa_config": {"beta": 1},
        "use_bdlora": {"nblocks": 1}, "arrow_config": {"top_k": 1},
        "megatron_config": {"a": 1}, "velora_config": {"a": 1}, "a_field_of_2030": "x",
    }  # fmt: skip
    for name, value in foreign.items():
        with pytest.raises(UnsupportedError, match=f"{name}="):
            LoraConfig.from_peft({**default, name: value})
    for name, value in {"peft_type": "LOHA", "task_type": "SEQ_CLS", "target_modules": None}.items():
        with pytest.raises(UnsupportedError, match=f"{name}={value!r} is not supported"):
            LoraConfig.from_peft({**default, name: value})


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}])
def test_reads_what_peft_wrote(fields, make_base, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(make_base("gemma2"))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    adapter = Adapter.read(tmp_path)
    adapter.validate(BaseCheckpoint.open(make_base("gemma2")))
    assert adapter.config.scale_of(Q) == 1.5
    reference = peft.get_peft_model_state_dict(model)
    assert {f"base_model.model.{n}" for n in adapter.tensors} == set(reference)
    assert any("magnitude" in name for name in reference) == adapter.config.use_dora
    for name, array in adapter.tensors.items():
        assert np.array_equal(array, reference[f"base_model.model.{name}"].numpy())


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_peft_reads_what_we_wrote(make_base, make_adapter, tmp_path, dtype, use_dora):
    base = BaseCheckpoint.open(make_base("gemma2"))
    adapter = make_adapter(base, dtype=dtype, use_dora=use_dora, **PATTERNS)
    adapter.write(tmp_path, str(base.directory))
    assert Adapter.read(tmp_path).config == adapter.config
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # missing or unexpected keys are warnings in peft
        model = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(base.directory), tmp_path
        )
    found = peft.get_peft_model_state_dict(model)
    assert set(found) == {f"base_model.model.{name}" for name in adapter.tensors}
    for name, array in adapter.tensors.items():
        assert np.array_equal(found[f"base_model.model.{name}"].float().numpy(), array.astype(np.float32))


def _broken(adapter: Adapter, edit) -> Adapter:
    tensors = {name: array.copy() for name, array in adapter.tensors.items()}
    edit(tensors)
    return Adapter(adapter.config, tensors)


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.clear(), "the adapter holds no tensor"),
        (lambda t: t.pop(B), f"{B} is missing, but {A} is present"),
        (lambda t: t.pop(A), f"{A} is missing, but {B} is present"),
        (lambda t: (t.pop(A), t.pop(B)), f"1 modules of the base are targets but have no factors, first '{Q}'"),
        (lambda t: t.update({A: t[A][:3]}), "expected rank 4, found 3 in lora_A and 4 in lora_B"),
        (lambda t: t.update({A: t[A][:, :9]}), rf"{A}: expected shape \(4, 64\) for .*, found \(4, 9\)"),
        (lambda t: t.update({B: t[B].T.copy()}), r"expected rank 4, found 4 in lora_A and 64 in lora_B"),
        (lambda t: t.update({B: t[B][:5]}), rf"{B}: expected shape \(64, 4\) for .*, found \(5, 4\)"),
        (lambda t: t[B].__setitem__((3, 1), np.nan), f"{B}: 1 of 256 values are not finite"),
        (lambda t: t.update({A: t[A].astype(np.float64)}), f"{A}: expected dtype float32.*found float64"),
        (lambda t: t.update({A: t[A][0]}), f"{A}: expected 2 dimensions"),
        (lambda t: t.update({"x": t[A]}), r"x: adapter_config.json says modules_to_save=\(\), which does not name it"),
        (
            lambda t: t.update({"o_proj.lora_A.weight": t[A], "o_proj.lora_B.weight": t[B]}),
            "o_proj: not a target of target_modules",
        ),
        (
            lambda t: t.update({"x.q_proj.lora_A.weight": t[A], "x.q_proj.lora_B.weight": t[B]}),
            "x.q_proj: the base at .* has no tensor 'x.q_proj.weight'",
        ),
    ],
)
def test_validate_names_tensor_expected_and_found(base, make_adapter, edit, message):
    adapter = make_adapter(base)
    adapter.validate(base)
    with pytest.raises(AdapterError, match=message):
        _broken(adapter, edit).validate(base)


MAGNITUDE = f"{Q}.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(MAGNITUDE), f"{MAGNITUDE} is missing, but {A} is present"),
        (lambda t: (t.pop(A), t.pop(B)), f"{A} is missing, but {MAGNITUDE} is present"),
        (lambda t: t.update({MAGNITUDE: t[MAGNITUDE][:9]}), rf"{MAGNITUDE}: expected shape \(64,\) for .*found \(9,\)"),
        (lambda t: t.update({MAGNITUDE: t[A]}), f"{MAGNITUDE}: expected 1 dimensions"),
        (lambda t: t[MAGNITUDE].__setitem__(5, np.inf), f"{MAGNITUDE}: 1 of 64 values are not finite"),
    ],
)
def test_a_dora_adapter_has_magnitudes(base, make_adapter, edit, message):
    adapter = make_adapter(base, use_dora=True)
    adapter.validate(base)
    with pytest.raises(AdapterError, match=message):
        _broken(adapter, edit).validate(base)


def test_magnitudes_without_dora_are_refused(base, make_adapter):
    tensors = make_adapter(base, use_dora=True).tensors
    with pytest.raises(AdapterError, match=r"expected a name ending in .*, as use_dora is off"):
        Adapter(make_adapter(base).config, tensors).validate(base)


def test_validate_needs_weights_and_matrices(base, make_adapter):
    with pytest.raises(CheckpointError, match="opened without weights"):
        make_adapter(base).validate(BaseCheckpoint.open(base.directory, weights=False))
    norm = {"model.norm.lora_A.weight": np.ones((4, 64), "f4"), "model.norm.lora_B.weight": np.ones((64, 4), "f4")}
    with pytest.raises(AdapterError, match=r"has shape \(64,\), expected \(out, in\)"):
        Adapter(LoraConfig(r=4, target_modules=("model.norm",)), norm).validate(base)


def test_read_names_what_is_missing_or_foreign(base, make_adapter, tmp_path):
    with pytest.raises(AdapterError, match=r"adapter_config.json is missing"):
        Adapter.read(tmp_path)
    make_adapter(base).write(tmp_path, "org/name")
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(AdapterError, match="truncated"):
        Adapter.read(tmp_path)
    weights.write_bytes(whole.replace(b"lora_A.weight", b"lora_E.weight"))
    with pytest.raises(UnsupportedError, match="adapters of embeddings are not supported"):
        Adapter.read(tmp_path)
    weights.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is missing"):
        Adapter.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    weights.write_bytes(whole)
    with pytest.raises(AdapterError, match="not JSON"):
        Adapter.read(tmp_path)


def test_a_combined_adapter_spells_a_regular_expression_out(base, make_adapter):
    adapters = [
        make_adapter(base, target_modules=r".*\.[01]\..*q_proj"),
        make_adapter(base, target_modules=("up_proj",)),
    ]
    combined = combine(adapters, [1.0, 0.5])
    combined.validate(base)
    assert combined.config.target_modules == (*adapters[0].modules, "up_proj")
