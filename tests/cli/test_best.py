"""`kithara-ray plan --best` through the `main` that the entry point calls, by estimate."""

import json
import shlex

import pytest
from tiny import SIZES, VOCABULARY

from kithara_ray import config as configuration
from kithara_ray.cli.app import main
from kithara_ray.plan import planner

YAML = """
model: {{preset_handle: {base}, lora_rank: 4}}
train_dataloader: {{dataset: {{type: SFTDataset, source: rows.jsonl, max_seq_len: 1024}}, per_device_batch_size: auto}}
optimizer: {{learning_rate: 2e-4}}
trainer: {{epochs: 2}}
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(planner.urls, "cache_dir", lambda: tmp_path / "cache")
    (tmp_path / "base").mkdir()
    config = dict(SIZES["llama"], model_type="llama", vocab_size=VOCABULARY)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run.yaml").write_text(YAML.format(base=tmp_path / "base"))
    return str(tmp_path / "run.yaml")


def test_offers_and_their_commands(written, capsys):
    options = ["--best", "--estimate", "--tokens", "1000000", "--length", "300", "--price", "v5e=1.2,v6e=2.7"]
    assert main(["plan", written, *options, "--slices", "v5e-4,v6e-8,v5p-8", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["tokens"] == 2_000_000
    offers = made["offers"]
    assert {offer["slice"] for offer in offers} <= {"v5e-4", "v6e-8"}  # v5p has no price
    assert [offer["cost"] for offer in offers] == sorted(offer["cost"] for offer in offers)
    for offer in offers:
        # Three samples of 300 tokens in a row of 1,024, or one in 384: so narrow a model's attention is cheaper there.
        wanted = (1024, 900 / 1024) if offer["packing"] else (384, 300 / 384)
        assert (offer["seq_len"], offer["useful"]) == (wanted[0], pytest.approx(wanted[1], rel=1e-3))
        trained = offer["global_batch"] * offer["seq_len"] * offer["useful"]
        assert (offer["steps"] - 1) * trained < 2_000_000 <= offer["steps"] * trained * (1 + 1e-3)
        words = shlex.split(offer["command"])
        assert words[:3] == ["kithara-ray", "train", written]
        given = configuration.load(written, words[4::2])
        assert given.trainer.remat == offer["remat"]
        assert given.train_dataloader.per_device_batch_size == offer["per_device_batch_size"]
        assert given.trainer.mesh.given() == offer["mesh"]
    assert main(["plan", written, *options, "--slices", "v5e-4", "--hours", "0.000001"]) == 1
    assert main(["plan", written, "--best", "--dollars", "5", "--tokens", "1000"]) == 1
    assert "--dollars needs --price" in capsys.readouterr().err
