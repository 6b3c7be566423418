"""What travels with an export beside its weights; what does not is named."""

import json
import shutil

import pytest
import transformers
from huggingface_hub import ModelCard

from kithara_ray.checkpoint.run_files import tokenizer_beside, tokenizer_of
from kithara_ray.errors import UnsupportedError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout, export
from kithara_ray.hf.exports.run_record import published
from kithara_ray.hf.facts.generation import describe_not_done, stops_of, with_stops
from kithara_ray.hf.facts.vocabulary import embedding_rows
from kithara_ray.hf.model_files import read_tokenizer, write_files

TOKENIZER = {
    "additional_chat_templates/tool_use.jinja": "T{{ messages }}",
    "tekken.json": "{}",
    "special_tokens_map.json": "{}",
}
PROCESSOR = {"preprocessor_config.json": "{}", "processor_config.json": "{}"}
MODEL = {"hf_quant_config.json": "{}", "generation_config.json": '{"eos_token_id": 3}'}
LEFT_OUT = {
    "original/params.json": "{}",
    "original/consolidated.00.pth": "x",
    "trainer_state.json": "{}",
    "training_args.bin": "x",
}


def _write(directory, files):
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def _edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _notes(out) -> list[str]:
    return json.loads((out / "export_report.json").read_text())["notes"]


@pytest.fixture
def full(make_base, tmp_path):
    """A base with a file of each kind."""
    directory = tmp_path / "base"
    shutil.copytree(make_base(), directory)
    _write(directory, TOKENIZER | PROCESSOR | MODEL | LEFT_OUT)
    return BaseCheckpoint.open(directory)


@pytest.mark.parametrize("layout", Layout)
def test_data_travels_and_the_rest_is_named(full, make_adapter, tmp_path, layout):
    out = tmp_path / "out"
    export(full, make_adapter(full), str(out), layout, base_name=str(full.directory))
    wanted = TOKENIZER | PROCESSOR | (MODEL if layout is not Layout.ADAPTER else {})
    assert {name: (out / name).read_text() for name in wanted} == wanted
    assert not any((out / name).exists() for name in [*LEFT_OUT, "modeling_evil.py", "pytorch_model.bin"])
    left_out = (
        "modeling_evil.py (code), original/consolidated.00.pth (weights in another format), original/params.json, "
        "pytorch_model.bin (weights in another format), tokenizer_evil.py (code), trainer_state.json, "
        "training_args.bin (weights in another format)"
    )
    if layout is Layout.ADAPTER:
        (note,) = (note for note in _notes(out) if note.startswith("readers of the adapter"))
        named = note.removeprefix("readers of the adapter take from its base: ").split(", ")
        assert set(left_out.split(", ")) | set(MODEL) == set(named)
    else:
        assert f"left out of the base's files: {left_out}" in _notes(out)


@pytest.mark.parametrize("layout", Layout)
def test_every_file_that_does_not_travel_is_named(make_base, make_adapter, tmp_path, layout):
    """However many they are; the card, which readers see, has the beginning of a long list."""
    directory = shutil.copytree(make_base(), tmp_path / "base")
    odd = [f"samples/{n}.wav" for n in range(90)] + ["a b.xyz", "no_extension", ".env", "UPPER.JSON"]
    _write(directory, dict.fromkeys([*odd, "README.md", "run.json", ".gitattributes", ".cache/huggingface/x"], "x"))
    (directory / "gone.json").symlink_to("/nowhere/gone.json")
    base, out = BaseCheckpoint.open(directory), tmp_path / "out"
    export(base, make_adapter(base), str(out), layout, base_name=str(directory))
    notes = _notes(out)
    (named,) = (
        note.partition(": ")[2].split(", ") for note in notes if "the base's files" in note or "readers" in note
    )
    assert set(named) >= {*odd, "gone.json (broken link)"}
    assert not {name for name in named if name.startswith(".git") or name.startswith(".cache")}
    assert "not the base's own, but of this export: README.md, run.json" in notes
    assert "export_report.json)" in (out / "README.md").read_text()
    assert "samples/89.wav" not in (out / "README.md").read_text()


def test_the_tokenizer_of_the_training_replaces_the_base_s(full, make_adapter, tmp_path):
    """With the same vocabulary what holds that alone stays; with another it is left out, and said."""
    kept, other = tmp_path / "run/tokenizer", tmp_path / "run2/tokenizer"
    same = json.loads((full.directory / "tokenizer.json").read_text())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w5"}
    _write(kept, {"tokenizer.json": json.dumps(same), "tokenizer_config.json": json.dumps(config)})
    _write(kept, {"chat_template.jinja": "mine", "generation_config.json": '{"eos_token_id": [3, 5]}'})
    same["model"]["vocab"]["new"] = 96
    _write(other, {"tokenizer.json": json.dumps(same), "tokenizer_config.json": json.dumps(config)})
    for layout in Layout:
        out, again = tmp_path / f"out-{layout}", tmp_path / f"again-{layout}"
        export(full, make_adapter(full), str(out), layout, base_name=str(full.directory), tokenizer=str(kept))
        loaded = transformers.AutoTokenizer.from_pretrained(out)
        assert (loaded.chat_template, loaded.eos_token) == ("mine", "w5")
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [3, 5]
        assert (out / "tekken.json").exists()
        assert not (out / "special_tokens_map.json").exists()
        stops = [note for note in _notes(out) if "trained answers end with" in note]
        assert len(stops) == (layout is Layout.ADAPTER)  # a server reads the base's settings there
        export(full, make_adapter(full), str(again), layout, base_name=str(full.directory), tokenizer=str(other))
        assert not (again / "tekken.json").exists()
        assert any("another vocabulary: the base's tekken.json were left out" in note for note in _notes(again))
        assert transformers.AutoTokenizer.from_pretrained(again).chat_template is None


def test_a_tokenizer_that_is_gone_is_said(full, make_adapter, tmp_path):
    out = tmp_path / "out"
    export(full, make_adapter(full), str(out), Layout.ADAPTER, base_name="n", tokenizer=str(tmp_path / "run/tokenizer"))
    assert _notes(out)[0] == "tokenizer: the training's tokenizer is gone; the export has the base's"


def test_code_that_transformers_has_itself_is_not_needed(full, make_adapter, tmp_path):
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    _edit(full.directory / "config.json", auto_map=auto_map, architectures=["OwnForCausalLM"])
    _edit(full.directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.A", None]})
    base = BaseCheckpoint.open(full.directory)
    for layout in (Layout.SEPARATE, Layout.MERGED):
        out = tmp_path / str(layout)
        export(base, make_adapter(base), str(out), layout, base_name=str(full.directory))
        model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        assert type(model) is transformers.LlamaForCausalLM
        assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert "auto_map" not in (out / "tokenizer_config.json").read_text()
        assert any("config.json: auto_map was left out with its code (modeling_own.py)" in note for note in _notes(out))


def test_code_that_only_the_base_has(full, make_adapter, tmp_path):
    """Of the Hub it is referred to; of a directory nothing could load the export."""
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM", "AutoConfig": "org/other--conf.Conf"}
    _edit(full.directory / "config.json", auto_map=auto_map, model_type="owntype")
    base = BaseCheckpoint.open(full.directory)
    with pytest.raises(UnsupportedError, match=r"needs code \(modeling_own.py\).*Export the adapter alone"):
        export(base, make_adapter(base), str(tmp_path / "out"), Layout.MERGED, base_name=str(full.directory))
    assert not (tmp_path / "out").exists()
    export(base, make_adapter(base), str(tmp_path / "alone"), Layout.ADAPTER, base_name=str(full.directory))
    export(base, make_adapter(base), str(tmp_path / "hub"), Layout.MERGED, base_name="hf://org/name@v1")
    assert json.loads((tmp_path / "hub/config.json").read_text())["auto_map"] == {
        "AutoModelForCausalLM": "org/name--modeling_own.OwnForCausalLM",
        "AutoConfig": "org/other--conf.Conf",
    }


def test_where_a_run_keeps_its_tokenizer(tmp_path):
    run, foreign = tmp_path / "runs/r", tmp_path / "a/foreign"
    for directory in (run / "tokenizer", tmp_path / "a/tokenizer"):
        _write(directory, {"tokenizer.json": "{}"})
    kept = str(run / "tokenizer")
    for place in ("", "adapter", "checkpoints", "checkpoints/step-00000002-0badf00d", "adapters/step-000002", "model"):
        assert tokenizer_of(f"{run}/{place}".rstrip("/")) == kept, place
    foreign.mkdir()
    assert tokenizer_of(str(foreign)) is None  # beside an adapter of any name stands anything
    _write(foreign, {"tokenizer_config.json": "{}"})
    assert tokenizer_of(str(foreign)) == str(foreign)
    assert tokenizer_beside([str(foreign), str(foreign)]) == str(foreign)
    other = tmp_path / "b"
    _write(other, {"tokenizer_config.json": '{"x": 1}'})
    assert tokenizer_beside([str(foreign), str(other)]) is None


def test_files_are_written_in_place_of_what_was_there(memory, tmp_path):
    files = {"tokenizer.json": b"{}", "additional_chat_templates/a.jinja": b"a"}
    for place in (str(tmp_path / "tokenizer"), "memory://run/tokenizer"):
        write_files(place, files | {"chat_template.jinja": b"old", "additional_chat_templates/b.jinja": b"b"})
        write_files(place, files)
        assert read_tokenizer(place) == files


def test_generation_settings(full):
    (full.directory / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.5}')
    gained = json.loads(with_stops(full.directory, (7, 3)))
    assert gained == {"eos_token_id": [3, 7], "temperature": 0.5}
    assert with_stops(full.directory, (3,)) == b'{"eos_token_id": 3, "temperature": 0.5}'
    (full.directory / "generation_config.json").unlink()
    assert with_stops(full.directory, ()) is None
    assert json.loads(with_stops(full.directory, (9,)))["eos_token_id"] == [*stops_of(full.config, {}), 9]
    assert stops_of({"text_config": {"eos_token_id": 4}}, {}) == [4]


def test_settings_that_generate_leaves_out_are_named():
    quiet = {"eos_token_id": 2, "temperature": 0.6, "repetition_penalty": 1.0, "min_length": 0, "bad_words_ids": []}
    assert describe_not_done(quiet) == []
    loud = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1, "stop_strings": ["X"]}
    sampling, changes = describe_not_done(loud)
    assert "ignores the sampling that generation_config.json asks for (do_sample=true, temperature=0.6)" in sampling
    assert 'repetition_penalty=1.1, stop_strings=["X"]' in changes
    for name in (
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_eos_token_id",
        "no_repeat_ngram_size",
        "num_beams",
    ):
        assert describe_not_done({name: 5}), name


def test_the_vocabulary_is_the_embedding_s_rows(full):
    _edit(full.directory / "config.json", vocab_size=5000)
    assert embedding_rows(BaseCheckpoint.open(full.directory)) == 96


RUN = {
    "platform": "Linux-6.1-host",
    "environment": {"JAX_X": "1"},
    "config": {"model": {"preset_handle": "/home/me/base"}},
    "settings": {
        "model": {"preset_handle": "/home/me/base", "precision": "float32", "target": r".*\.(q|v)_proj"},
        "run_config": {"storage_path": "/home/me/runs"},
        "optimizer": {"class_name": "AdamW", "config": {"beta_1": 0.9}},
        "train_dataloader": {
            "packing": True,
            "dataset": {"source": ["/data/me/train.jsonl", "hf://datasets/org/set/x.parquet"], "max_seq_len": 64},
        },
    },
    "data": {"train": {"rows": 1200, "tokens": 34000, "trained_tokens": 9000}},
    "mesh": {"devices": 4},
    "rows_per_device_and_step": 2,
    "optimizer": "AdamW",
    "optimizer_settings": {"learning_rate": 2e-4, "clipnorm": 1.0},
    "result": {"path": "/home/me/runs/r", "metrics": {"loss": 1.25}},
    "evaluation": {"eval_loss": 1.5},
    "last_step": {"step": 30, "epoch": 1.5, "loss": 1.25},
}


def test_what_is_published_names_no_place_of_the_host():
    told = published(RUN)
    assert "/home" not in json.dumps(told)
    assert not {"platform", "environment", "config"} & told.keys()
    dataset = told["settings"]["train_dataloader"]["dataset"]
    assert dataset["source"] == ["train.jsonl", "hf://datasets/org/set/x.parquet"]
    assert told["settings"]["model"] == {"preset_handle": "base", "precision": "float32", "target": r".*\.(q|v)_proj"}
    assert told["settings"]["optimizer"] == {"class_name": "AdamW", "config": {"beta_1": 0.9}}
    within = published({"source": "/home/me/runs/r", "training": {"manifest_version": 1, **RUN}})["training"]
    assert within == {"manifest_version": 1, **told}
    assert RUN["platform"]  # what was given is left as it is


@pytest.mark.parametrize("layout", Layout)
def test_the_card_is_for_readers(full, make_adapter, tmp_path, layout):
    (full.directory / "README.md").write_text("---\nlicense: gemma\nlicense_link: https://x.y/z\n---\n# Base\n")
    out = tmp_path / "out"
    export(full, make_adapter(full), str(out), layout, base_name="hf://org/name@v1", run=RUN)
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "org/name"
    assert card.data.base_model_relation == ("adapter" if layout is Layout.ADAPTER else "finetune")
    assert card.data.library_name == ("peft" if layout is Layout.ADAPTER else "transformers")
    assert (card.data.license, card.data.datasets) == ("gemma", ["org/set"])
    assert card.data.tags == ["lora", "kithara-ray"]
    for row in (
        "| Method | LoRA, rank 4, alpha 10 |",
        "| Source | `train.jsonl`, `org/set` |",
        "| Tokens | 34,000, of which 9,000 are trained on |",
        "| Steps | 30 (1.5 epochs) |",
        "| Batch | 8 rows a step |",
        "| Optimizer | AdamW, learning rate 0.0002 |",
        "| Evaluation loss | 1.5 |",
    ):
        assert row in card.text, row
    assert "[LICENSE](LICENSE)" in card.text
    assert "/home" not in card.text
    assert max(len(line) for line in card.text.splitlines() if line.startswith("|")) < 120
    assert "/home" not in (out / "run.json").read_text()
