"""Exports that are refused, or taken, before there is anything to export."""

import json
import os

import pytest
import tiny

from kithara_ray import config as configuration
from kithara_ray import tune
from kithara_ray.errors import ConfigError
from kithara_ray.hf.exports.export import Layout
from kithara_ray.hf.exports.request import ExportRequest, requests_of
from kithara_ray.hf.lora_config import LoraConfig

LORA = LoraConfig(r=2)


@pytest.mark.parametrize(
    ("arguments", "lora", "message"),
    [
        ({}, LORA, "exports: missing 1 required positional argument: 'output_dir'"),
        ({"output_dir": "/x", "colour": "red"}, LORA, "exports: got an unexpected keyword argument 'colour'"),
        ({"output_dir": "/x", "dtype": "int3"}, LORA, "dtype must be"),
        ({"output_dir": "/x", "only_save_adapters": True}, None, "so there is no adapter; leave both out"),
        ({"output_dir": "/x", "check_logits": True}, None, "and all weights of this model are trained; leave it out"),
        (
            {"output_dir": "/x", "check_logits": True, "save_adapters_separately": True},
            LORA,
            "in a local directory, and this export writes the adapter separately; leave it out",
        ),
        ({"output_dir": "gs://b/x", "check_logits": True}, LORA, "and gs://b/x is a URL; leave it out"),
    ],
)
def test_what_could_not_be_made_is_refused(arguments, lora, message):
    with pytest.raises(ConfigError, match=message):
        requests_of([arguments], lora)


def test_each_export_has_a_directory_of_its_own():
    for second in ("/a", "/a/b", os.path.relpath("/a")):
        with pytest.raises(ConfigError, match="give each a directory of its own"):
            requests_of([{"output_dir": "/a"}, {"output_dir": second}], LORA)
    merged, adapter = requests_of(
        [{"output_dir": "a", "check_logits": True}, {"output_dir": "ab", "only_save_adapters": True}], LORA
    )
    assert merged.output_dir == os.path.abspath("a")
    assert [request.layout for request in (merged, adapter)] == [Layout.MERGED, Layout.ADAPTER]
    assert ExportRequest("/x", save_adapters_separately=True).layout is Layout.SEPARATE


def test_a_search_is_refused_for_its_exports(tiny_models, tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in tiny.rows(4)))
    config = {
        "model": {"preset_handle": str(tiny_models["llama"]), "lora_rank": 2},
        "train_dataloader": {
            "dataset": {"type": "SFTDataset", "source": str(tmp_path / "train.jsonl"), "max_seq_len": 32},
            "per_device_batch_size": 1,
        },
        "optimizer": {"learning_rate": 0.001},
        "trainer": {"steps": 1},
        "tune": {"space": {"model.lora_rank": {"choice": [2, 4]}}, "metric": "loss"},
        "exports": [{"output_dir": "gs://b/x", "check_logits": True}],
    }
    with pytest.raises(ConfigError, match="check_logits compares a merged model in a local directory"):
        tune.run(configuration.checked(config, "test"))
