"""The files that a run keeps of its tokenizer load as the tokenizer that it trains with."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kithara_ray.errors import ConfigError
from kithara_ray.hf.model_files import write_files
from kithara_ray.sft.tokens.prompts import Prompting
from kithara_ray.sft.tokens.tokenizer_files import files_of, read_template

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def base(tmp_path):
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_p": 0.9}))
    return str(directory)


def test_a_handle_s_files_are_kept_byte_for_byte(tokenizer_directories, kind, base):
    source = tokenizer_directories[kind]
    files = files_of(Prompting(str(source), ends=(1, 2)), base)
    assert json.loads(files.pop("generation_config.json")) == {"eos_token_id": [1, 2], "top_p": 0.9}
    assert files == {path.name: path.read_bytes() for path in source.iterdir()}


@pytest.mark.parametrize("given", ["handle", "object"])
def test_the_template_of_the_training_is_the_only_one(tokenizer_directories, kind, base, tmp_path, given):
    source = AutoTokenizer.from_pretrained(tokenizer_directories[kind])
    source.chat_template = {"default": "old", "tool_use": "older"}
    source.eos_token = source.bos_token
    source.save_pretrained(tmp_path / "mine")
    config = json.loads((tmp_path / "mine/tokenizer_config.json").read_text())
    (tmp_path / "mine/tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "oldest"}))
    files = files_of(Prompting(str(tmp_path / "mine") if given == "handle" else source, TEMPLATE), base)
    write_files(str(tmp_path / "kept"), files)
    kept = AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert (kept.chat_template, kept.eos_token) == (TEMPLATE, source.bos_token)
    assert "oldest" not in (tmp_path / "kept/tokenizer_config.json").read_text()
    assert kept("the answer, foobar")["input_ids"] == source("the answer, foobar")["input_ids"]
    assert source.chat_template == {"default": "old", "tool_use": "older"}


def test_a_template_is_text_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.jinja").write_text(TEMPLATE)
    for given in ("my.jinja", str(tmp_path / "my.jinja"), Path("my.jinja"), TEMPLATE):
        assert read_template(given) == TEMPLATE
    assert read_template(None) is None


WRONG = {
    "nowhere.jinja": "is not Jinja text, and there is no such file. Give the template's text, or the path",
    "chatml": "is not Jinja text, and there is no such file",
    "gs://bucket/a.jinja": "give a local file, or the template's text",
    "plain.txt": "the file holds no Jinja template",
    "tokenizer_config.json": "the file holds no Jinja template",
    "binary": "cannot be read as text",
}


@pytest.mark.parametrize("given", WRONG)
def test_a_template_that_is_neither(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plain.txt").write_text("hello")
    Path("tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    Path("binary").write_bytes(b"\xff\xfe\x00{{")
    with pytest.raises(ConfigError, match="chat_template=.*" + WRONG[given]):
        read_template(given)
    with pytest.raises(ConfigError, match="must be Jinja text or the path of a file, got int"):
        read_template(3)
