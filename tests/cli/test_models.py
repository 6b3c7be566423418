"""`kithara-ray models` through the `main` that the entry point calls."""

import json
import subprocess
import sys
import time

import numpy as np
import plain_llama
import pytest
from models_table import table
from tiny import MULTIMODAL, SIZES, load

from kithara_ray.cli.app import main
from kithara_ray.hf.tower import WRAPPERS, is_beside
from kithara_ray.model.families import FAMILIES
from kithara_ray.model.families.admission import Admission, admissions

PARAMETERS = sum(int(np.prod(shape)) for shape in plain_llama.shapes().values())


def described(directory, **fields):
    """A directory that holds only config.json."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(plain_llama.CONFIG | fields))
    return str(directory)


def answer(capsys, *handles):
    code = main(["models", *map(str, handles), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["handle"] for row in rows] == [str(handle) for handle in handles]
    assert code == int(not all(row["accepted"] for row in rows))
    return rows


def test_config_json_is_enough_and_weights_are_compared_with_it(tmp_path, capsys):
    whole = plain_llama.write(tmp_path / "whole")
    alone = described(tmp_path / "alone")
    rows = answer(capsys, whole, alone)
    accepted = dict(model_type="llama", accepted=True, reason=None, parameters=PARAMETERS)
    assert rows == [dict(handle=str(handle), **accepted) for handle in (whole, alone)]
    # A tied head is no parameter of its own.
    (row,) = answer(capsys, described(tmp_path / "tied", tie_word_embeddings=True))
    assert row["parameters"] == PARAMETERS - plain_llama.VOCABULARY * plain_llama.HIDDEN
    (row,) = answer(capsys, plain_llama.write(tmp_path / "other", num_hidden_layers=3))
    assert "9 tensors are missing" in row["reason"]
    assert row["parameters"] is None


def test_every_refusal_is_a_row_with_its_reason(tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    pickled = described(tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    rows = {
        described(tmp_path / "good"): None,
        str(tmp_path / "broken"): "not JSON",
        str(tmp_path / "empty"): "config.json is missing",
        str(tmp_path / "nowhere"): "no directory at",
        str(tmp_path / "broken" / "config.json"): "is a file",
        pickled: "pickle is not read",
        "memory://nothing/here": "no model files there",
        "kaggle://gemma/2b": "presets hold Keras weights",
        described(tmp_path / "fp8", quantization_config={"quant_method": "fp8"}): "quantised by 'fp8'",
        described(tmp_path / "latent", model_type="deepseek_v3", kv_lora_rank=512): "LoRA on its two-step projections",
        described(tmp_path / "both ways", is_causal=False): "is_causal=False",
        described(tmp_path / "lacking", hidden_size=None): "hidden_size",
        described(tmp_path / "nameless", model_type=3): "must name the family",
    }
    for row, reason in zip(answer(capsys, *rows), rows.values(), strict=True):
        assert row["accepted"] is (reason is None)
        assert reason is None or reason in row["reason"]
        assert (row["parameters"] is None) is (reason is not None)


def test_an_object_store_s_headers_are_enough(tmp_path, capsys):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.put(str(plain_llama.write(tmp_path / "base")), "/models-command", recursive=True)
    try:
        (row,) = answer(capsys, "memory://models-command")
    finally:
        fs.rm("/models-command", recursive=True)
    assert row["accepted"]
    assert row["parameters"] == PARAMETERS


def test_the_table_and_the_families(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["models", described(tmp_path / "good"), str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "1 of 2 accepted" in shown
    assert "config.json is missing" in shown
    assert main(["models"]) == 0
    assert set(FAMILIES) <= set(capsys.readouterr().out.split())
    assert main(["models", "--json"]) == 0
    assert {row["model_type"] for row in json.loads(capsys.readouterr().out)} == {*FAMILIES, *WRAPPERS}
    assert main(["models", "--yaml"]) == 2


def test_the_docs_table_names_models_and_not_their_directories():
    rows = [Admission("/a/b", "llama", None, 135_000_000), Admission("/a/c", "x", "config.json: a|b is new", None)]
    assert table(rows).splitlines()[0] == "1 of 2 are accepted."
    assert table(rows).splitlines()[4:] == [
        "| b | `llama` | 135M | accepted |",
        "| c | `x` |  | a\\|b is new |",
    ]


def test_many_models_share_one_start(tmp_path):
    """Neither jax, keras, ray nor transformers is loaded, and forty models take less than a second beyond that."""
    handles = [described(tmp_path / f"model {number}") for number in range(40)]
    code = (
        "import sys, kithara_ray.cli.app as app; app.main(['models', *sys.argv[1:]]); "
        "print(sorted({'jax', 'keras', 'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *handles], capture_output=True, text=True, check=True)
    assert "40 of 40 accepted" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    before = time.process_time()
    assert len(admissions(handles)) == 40
    assert time.process_time() - before < 1


@pytest.mark.parametrize("family", SIZES)
def test_every_family_is_accepted_with_transformers_count(family, tiny_models, capsys):
    (row,) = answer(capsys, tiny_models[family])
    model = load(tiny_models[family])
    config, saved = model.config.to_dict(), model.state_dict().keys()
    held = ((name, buffer) for name, buffer in model.named_buffers() if not is_beside(config, name))
    buffers = sum(buffer.numel() for name, buffer in held if name in saved)
    beside = sum(p.numel() for name, p in model.named_parameters() if is_beside(config, name))
    assert row["parameters"] == model.num_parameters() - beside + buffers
    assert (beside > 0) == (family in MULTIMODAL)
