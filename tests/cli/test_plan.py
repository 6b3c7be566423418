"""`kithara-ray plan` through the `main` that the entry point calls, from a directory that holds config.json alone."""

import json

import pytest
from tiny import SIZES, VOCABULARY

from kithara_ray.cli.app import main
from kithara_ray.plan import planner

YAML = """
model: {{preset_handle: {base}, lora_rank: 4, target_modules: all-linear}}
train_dataloader:
  dataset: {{type: SFTDataset, source: rows.jsonl, max_seq_len: 200}}
  per_device_batch_size: 2
optimizer: {{learning_rate: 2e-4}}
trainer: {{gradient_accumulation_steps: 3, mesh: {{tensor: 2}}}}
scaling_config: {{use_tpu: true, topology: 2x2, accelerator_type: TPU-V5LITEPOD, num_workers: 1}}
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(planner.urls, "cache_dir", lambda: tmp_path / "cache")
    config = dict(SIZES["llama"], model_type="llama", vocab_size=VOCABULARY)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run.yaml").write_text(YAML.format(base=tmp_path / "base"))
    return str(tmp_path / "run.yaml")


def test_a_plan_of_a_configuration(written, capsys):
    assert main(["plan", written, "--estimate", "--json", "--price", "1.2"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["slice"] == "v5e-4"
    assert made["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert made["tokens_per_step"] == 4 * 2 * 3 * 256
    # q, k, v, o, gate, up and down of three blocks, rank 4.
    d, f, kv = 96, 128, 32
    assert made["settings"]["trainable"] == 3 * 4 * (4 * d + 2 * (d + kv) + 3 * (d + f))
    assert made["cost"]["per_hour"] == pytest.approx(4.8)
    assert made["estimated_because"]
    assert main(["plan", written, "--estimate", "--slice", "v5e-4"]) == 0
    shown = capsys.readouterr().out
    assert "(estimated)" in shown
    assert "HBM per chip: frozen" in shown


def test_what_is_refused(written, capsys):
    assert main(["plan", written, "--slice", "v5e-3"]) == 1
    assert "v5e comes as" in capsys.readouterr().err
    assert main(["plan", written, "--seq", "1k"]) == 1
    assert "expected numbers separated by commas" in capsys.readouterr().err
