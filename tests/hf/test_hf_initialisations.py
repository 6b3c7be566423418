"""Adapters of every `init_lora_weights` of PEFT: those that merge plainly do so bit by bit, the others are refused with
a way to convert them, and the way leads there."""

import json
import typing
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from merging import merge

from kithara_ray.errors import UnsupportedError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.lora_config import LoraConfig

TARGETS = ["q_proj", "down_proj"]
EXTRA = {"eva": {"eva_config": peft.tuners.lora.EvaConfig()}}
TOKENS = torch.tensor([[5, 9, 30, 2, 77, 41]])


def plain(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


def adapted(base, init):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=init, task_type="CAUSAL_LM",
            **EXTRA.get(init, {}),
        )  # fmt: skip
        return peft.get_peft_model(plain(base), config)


def trained(base, init, directory):
    """Saved as PEFT saves it; its factors are moved as training moves them."""
    torch.manual_seed(0)
    model = adapted(base, init)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        logits = model(TOKENS).logits
    model.save_pretrained(directory)
    return logits


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_a_plain_adapter_merges_bit_by_bit_as_peft_s(tiny_models, tmp_path, init):
    base = BaseCheckpoint.open(tiny_models["llama"])
    trained(base.directory, init, tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(plain(base.directory), tmp_path / "adapter").merge_and_unload()
    out = tmp_path / "merged"
    out.mkdir()
    adapter = Adapter.read(tmp_path / "adapter")
    merge(base, adapter, out)
    merged, changed = BaseCheckpoint.open(out), 0
    tensors = reference.state_dict()
    for name in merged.names:
        assert merged.view(name).tobytes() == tensors[name].numpy().tobytes(), name
        changed += merged.view(name).tobytes() != base.view(name).tobytes()
    assert changed == len(adapter.modules) == 6


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_residual_adapter_is_refused_and_converts_as_said(tiny_models, tmp_path, init):
    base = BaseCheckpoint.open(tiny_models["llama"])
    logits = trained(base.directory, init, tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=f"init_lora_weights='{init}' .*path_initial_model_for_weight_conv"):
        Adapter.read(tmp_path / "adapter")
    torch.manual_seed(0)  # of pissa_niter's randomised decomposition
    model = peft.PeftModel.from_pretrained(plain(base.directory), tmp_path / "adapter")
    torch.manual_seed(0)
    adapted(base.directory, init).save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))

    adapter = Adapter.read(tmp_path / "plain")
    adapter.validate(base)
    assert (adapter.config.r, adapter.config.init_lora_weights) == (8, True)
    out = tmp_path / "merged"
    out.mkdir()
    merge(base, adapter, out)
    with torch.no_grad():
        np.testing.assert_allclose(plain(out)(TOKENS).logits, logits, atol=2e-3)
        assert (plain(base.directory)(TOKENS).logits - logits).abs().max() > 1


def test_a_minor_component_adapter_merges_as_said(tiny_models, tmp_path):
    base = BaseCheckpoint.open(tiny_models["llama"])
    trained(base.directory, "mica", tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"init_lora_weights='mica' .*only lora_A"):
        Adapter.read(tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(plain(base.directory), tmp_path / "adapter").merge_and_unload()
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": True}))
    out = tmp_path / "merged"
    out.mkdir()
    merge(base, Adapter.read(tmp_path / "adapter"), out)
    tensors, merged = reference.state_dict(), BaseCheckpoint.open(out)
    assert all(merged.view(name).tobytes() == tensors[name].numpy().tobytes() for name in merged.names)


def test_every_initialisation_of_peft_is_decided():
    """None that PEFT names falls through to a message that says nothing of it."""
    annotation = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    names = {name for kind in typing.get_args(annotation) for name in typing.get_args(kind)}
    assert {"pissa", "olora", "corda", "loftq", "eva", "orthogonal", "mica", "gaussian"} <= names
    names |= {"lora_ga"}  # PEFT takes it, and names it in its documentation alone
    config = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    for name in names:
        name = name.replace("[number of iters]", "4")
        if name in ("eva", "orthogonal", "gaussian"):
            assert LoraConfig.from_peft({**config, "init_lora_weights": name}).matches("q_proj")
        else:
            with pytest.raises(UnsupportedError, match=f"init_lora_weights='{name}' is not supported: PEFT"):
                LoraConfig.from_peft({**config, "init_lora_weights": name})
    with pytest.raises(UnsupportedError, match="init_lora_weights='of 2030' is not supported"):
        LoraConfig.from_peft({**config, "init_lora_weights": "of 2030"})
