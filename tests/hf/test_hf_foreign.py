"""Adapters that PEFT has made, of every family: merged as PEFT merges them, bit by bit, or refused by name."""

import peft
import pytest
import tiny
import torch
import transformers

from kithara_ray.cli.app import main
from kithara_ray.hf.checkpoint import BaseCheckpoint

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# PEFT adapts experts by other means than LoRA on a layer, and parts beside a text model too.
NAMED_TARGETS = tiny.MIXTURES | tiny.MULTIMODAL
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
                model = tiny.load(tiny_models[family])
                model.to(getattr(torch, dtype)).save_pretrained(self[key])
            return self[key]

    return Models()


def _cases():
    """Every case of llama's, most of the families that a short test compares, and one of each other family."""
    for family in sorted(tiny.SIZES):
        alike = family == "olmo3" or family in tiny.LIKE_OTHERS - {"starcoder2"}
        for case in ["plain"] if family in NAMED_TARGETS else ["rslora"] if family in tiny.OWN or alike else CASES:
            if case not in ("expression", "selected") or family == "llama":
                yield pytest.param(family, case, marks=pytest.mark.long if alike else [])


@pytest.mark.parametrize(("family", "case"), [*_cases()])
def test_merged_bit_by_bit_as_peft_does(models, tmp_path, family, case):
    directory = models[family, DTYPES[case]]
    model = tiny.load(directory, dtype="auto")
    fields, changing = dict(CASES[case]), set(tiny.TARGETS[family])
    if family in tiny.MULTIMODAL:
        fields["target_modules"] = rf".*language_model.*\.({'|'.join(changing)})"
    elif family in tiny.MIXTURES:
        fields["target_modules"] = sorted(changing)
    elif case != "rslora":
        changing = {"q_proj"} if case == "expression" else set(fields["target_modules"])
    _save(model, tmp_path / "adapter", **fields)
    again = tiny.load(directory, dtype="auto")
    expected = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload().state_dict()
    out = tmp_path / "merged"
    assert main(["merge", f"--base={directory}", f"--adapter={tmp_path / 'adapter'}", f"--to={out}"]) == 0
    merged, base = BaseCheckpoint.open(out), BaseCheckpoint.open(directory)
    changed = set()
    for name in merged.names:
        if name not in expected:  # transformers holds all experts' in one, and names others anew
            assert ".experts." in name or name.split(".")[-2] not in changing
            assert merged.view(name).tobytes() == base.view(name).tobytes(), name
            continue
        # transformers holds some weights that it does not adapt in float32.
        theirs = expected[name].to(getattr(torch, DTYPES[case])).reshape(-1).view(torch.uint8).numpy().tobytes()
        assert merged.view(name).tobytes() == theirs, name
        if theirs != base.view(name).tobytes():
            changed.add(name.split(".")[-2])
    assert changed == changing


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
