"""A run from its YAML alone: examples/sft_lora.yaml with a tiny model and other paths."""

import json
from pathlib import Path

import pytest
import tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kithara_ray.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "sft_lora.yaml"


@pytest.fixture
def arguments(tiny_models, tmp_path):
    """The example's path, and what is set for this machine."""
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in tiny.rows(12)))
    changes = {
        "model.preset_handle": tiny_models["llama"],
        "train_dataloader.dataset.source": data,
        "train_dataloader.dataset.max_seq_len": 64,
        "trainer.steps": 2,
        "trainer.progress": "false",
        "run_config.storage_path": tmp_path / "runs",
        "run_config.name": "mine",
        **{
            f"exports.{number}.output_dir": tmp_path / name for number, name in enumerate(("adapter", "both", "merged"))
        },
    }
    return [str(EXAMPLE), *(word for key, value in changes.items() for word in ("--set", f"{key}={value}"))]


def test_the_example_trains_and_exports(cluster, arguments, tiny_models, tmp_path, capsys):
    assert main(["train", *arguments]) == 0
    out = capsys.readouterr().out
    assert f"exported {tmp_path / 'merged'}" in out
    assert "loss " in out
    base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").peft_config["default"]
    assert (adapted.r, adapted.lora_alpha, "down_proj" in adapted.target_modules) == (16, 32, True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "both").load_adapter(tmp_path / "both" / "adapter")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_config.json").is_file()
