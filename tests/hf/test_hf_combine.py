"""Weighted sums of adapters, against peft's add_weighted_adapter and merge_and_unload; and the command that merges."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers

from kithara_ray.cli.app import main
from kithara_ray.errors import ConfigError, UnsupportedError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.merging.combine import combine, read_weighted

WEIGHTS = [0.7, -0.3]


@pytest.fixture
def two(base, make_adapter, tmp_path):
    """Different ranks, scales and targets; q_proj is in both."""
    first = make_adapter(base, seed=1, target_modules=("q_proj", "v_proj"))
    second = make_adapter(base, seed=2, target_modules=("q_proj", "down_proj"), r=6, lora_alpha=9, use_rslora=True)
    first.write(tmp_path / "first", str(base.directory))
    second.write(tmp_path / "second", str(base.directory))
    return first, second


def _merged_by_peft(base, tmp_path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base.directory)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    model.add_weighted_adapter(["first", "second"], WEIGHTS, "sum", combination_type="cat")
    model.set_adapter("sum")
    return model.merge_and_unload(adapter_names=["sum"]).state_dict()


def test_the_command_merges_a_weighted_sum_as_peft_does(base, two, tmp_path, capsys):
    expected = _merged_by_peft(base, tmp_path)
    out = tmp_path / "out"
    adapters = [f"{tmp_path / 'first'}:{WEIGHTS[0]}", f"{tmp_path / 'second'}:{WEIGHTS[1]}"]
    options = [f"--adapter={adapter}" for adapter in adapters]
    assert main(["merge", f"--base={base.directory}", *options, f"--to={out}"]) == 0
    shown = capsys.readouterr().out
    assert f"exported merged to {out}: 1 weight files" in shown
    assert "tensors: 9 merged (9 changed)" in shown
    merged = BaseCheckpoint.open(out)
    for name in merged.names:
        assert merged.view(name).tobytes() == expected[name].numpy().tobytes(), name
    assert json.loads((out / "run.json").read_text())["adapters"] == ["first:0.7", "second:-0.3"]


def test_the_combined_adapter_computes_the_sum_in_peft(base, two, tmp_path):
    combined = combine(two, WEIGHTS)
    assert combined.config.rank_of("model.layers.0.self_attn.q_proj") == 10
    assert {combined.config.scale_of(module) for module in combined.modules} == {1.0}
    combined.validate(base)
    combined.write(tmp_path / "combined", str(base.directory))
    for module in combined.modules:
        expected = sum(
            weight * adapter.config.scale_of(module) * adapter.b(module).astype(float) @ adapter.a(module).astype(float)
            for adapter, weight in zip(two, WEIGHTS, strict=True)
            if module in adapter.modules
        )
        assert np.allclose(combined.b(module) @ combined.a(module), expected, atol=1e-6), module
    read = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base.directory), tmp_path / "combined"
    )
    ids = torch.arange(1, 13).reshape(2, 6)
    expected = _merged_by_peft(base, tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base.directory)
    plain.load_state_dict(expected)
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, plain(ids).logits, atol=1e-5)


def test_one_adapter_of_weight_one_is_merged_as_it_is(base, make_adapter, tmp_path):
    make_adapter(base).write(tmp_path / "one", str(base.directory))
    for name, adapter in (("plain", tmp_path / "one"), ("weighted", f"{tmp_path / 'one'}:1")):
        command = ["merge", f"--base={base.directory}", f"--adapter={adapter}", f"--to={tmp_path / name}"]
        assert main([*command, "--format=adapter"]) == 0
    one, other = Adapter.read(tmp_path / "plain"), Adapter.read(tmp_path / "weighted")
    assert one.config == other.config == make_adapter(base).config
    assert all(np.array_equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_refusals(base, two, make_adapter, tmp_path, capsys):
    with pytest.raises(ConfigError, match="weight must be finite, got nan"):
        combine(two, [1, float("nan")])
    with pytest.raises(ConfigError, match="a weight for each adapter, got 2 and 1"):
        combine(two, [1])
    with pytest.raises(UnsupportedError, match="DoRA adapters cannot be combined"):
        combine([make_adapter(base, use_dora=True), two[0]], [1, 1])
    assert read_weighted(f"{tmp_path / 'first'}:-0.5")[1] == -0.5
    assert main(["merge", "--base", str(base.directory), "--adapter", "no/where:0.5", "--to", str(tmp_path / "x")]) == 1
    assert "error: no directory at" in capsys.readouterr().err
