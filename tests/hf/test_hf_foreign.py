"""Adapters that PEFT has made, of every family: merged as PEFT merges them, bit by bit, or refused by name."""

import peft
import pytest
import tiny
import torch
import transformers

from kithara_ray.cli.app import main
from kithara_ray.hf.checkpoint import BaseCheckpoint

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# transformers holds a block's experts in one parameter, which PEFT adapts by other means than LoRA on a layer.
MIXTURES = ("gpt_oss", "mixtral", "qwen3_moe", "qwen3_next")
CASES = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 7},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "r": 5},
    "dora": {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {r"layers\.1\..*q_proj": 2, "v_proj": 6},
        "alpha_pattern": {"o_proj": 3, r"layers\.[03]\..*k_proj": 11},
    },
    "expression": {"target_modules": r".*layers\.1.*q_proj"},
    "selected": {"target_modules": ATTENTION, "layers_to_transform": [1, 2], "exclude_modules": r".*\.1\..*k_proj"},
}
DTYPES = {
    "plain": "bfloat16",
    "rslora": "float32",
    "dora": "bfloat16",
    "patterns": "float16",
    "expression": "float32",
    "selected": "bfloat16",
}


def _save(model: transformers.PreTrainedModel, directory, **fields) -> peft.PeftModel:
    """A random adapter, B too, as PEFT saves it."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **fields}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    adapted.save_pretrained(directory)
    return adapted


@pytest.fixture(scope="module")
def models(tiny_models, tmp_path_factory):
    """(family, dtype) -> directory."""

    class Models(dict):
        def __missing__(self, key):
            family, dtype = key
            if dtype == "float32":
                self[key] = tiny_models[family]
            else:
                self[key] = tmp_path_factory.mktemp(f"{family}-{dtype}")
                model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models[family])
                model.to(getattr(torch, dtype)).save_pretrained(self[key])
            return self[key]

    return Models()


@pytest.mark.parametrize(
    ("family", "case"),
    [
        (family, case)
        for family in sorted(tiny.SIZES.keys() - tiny.OWN - tiny.LIKE_OTHERS)
        for case in CASES
        if (case not in ("expression", "selected") or family == "llama")
        and (family not in {*MIXTURES, *tiny.MULTIMODAL} or case == "plain")
    ]
    # Their files differ from llama's by the layers' names.
    + [(family, "rslora") for family in ("phi3", "starcoder2")],
)
def test_merged_bit_by_bit_as_peft_does(models, tmp_path, family, case):
    directory = models[family, DTYPES[case]]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    fields = CASES[case] | ({"target_modules": ATTENTION} if family in MIXTURES else {})
    if family == "gemma4":  # whose vision tower has layers that PEFT cannot adapt
        fields |= {"target_modules": r".*language_model.*\.(q_proj|v_proj)"}
    targets = fields["target_modules"]
    _save(model, tmp_path / "adapter", **fields)
    again = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    expected = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload().state_dict()
    out = tmp_path / "merged"
    assert main(["merge", f"--base={directory}", f"--adapter={tmp_path / 'adapter'}", f"--to={out}"]) == 0
    merged, base = BaseCheckpoint.open(out), BaseCheckpoint.open(directory)
    changed = set()
    for name in merged.names:
        if name not in expected:  # an expert's own tensor; transformers holds them in one
            assert family in MIXTURES
            assert merged.view(name).tobytes() == base.view(name).tobytes(), name
            continue
        theirs = expected[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert merged.view(name).tobytes() == theirs, name
        if theirs != base.view(name).tobytes():
            changed.add(name.split(".")[-2])
    named = {"rslora": set(tiny.TARGETS[family]), "expression": {"q_proj"}}
    assert changed == named.get(case, set(CASES[case]["target_modules"] if family == "gemma4" else targets))


REFUSED = {
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "trainable_token_indices": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 2]}},
    "init_lora_weights": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_not_be_honoured_is_refused_by_name(tiny_models, tmp_path, capsys, field):
    directory = tiny_models["gemma"]  # its embedding and its head are one tensor
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    _save(model, tmp_path / "adapter", **REFUSED[field])
    out = tmp_path / "merged"
    capsys.readouterr()
    assert main(["merge", f"--base={directory}", f"--adapter={tmp_path / 'adapter'}", f"--to={out}"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert field in message
    assert not out.exists()


def test_peft_of_another_kind_is_refused_by_name(tiny_models, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    config = peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    options = [f"--base={tiny_models['llama']}", f"--adapter={tmp_path / 'adapter'}", f"--to={tmp_path / 'x'}"]
    assert main(["merge", *options]) == 1
    assert "peft_type='LOHA' is not supported" in capsys.readouterr().err
