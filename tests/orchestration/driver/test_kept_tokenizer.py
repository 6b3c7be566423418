"""A run's tokenizer as files and as run.json has it; written by a coordinator of this process, without Ray."""

import json
import shutil

import pytest
import tiny
from transformers import AutoTokenizer

from kithara_ray.errors import DestinationError
from kithara_ray.orchestration.driver import kept_tokenizer
from kithara_ray.orchestration.head.coordinator import Coordinator
from kithara_ray.sft.tokens.prompts import Prompting


def keep(*given):
    return kept_tokenizer.keep(*given, Coordinator().keep_files)


@pytest.fixture
def base(tmp_path):
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text('{"eos_token_id": 2}')
    tiny.tokenizer().save_pretrained(directory)
    return str(directory)


def test_it_is_kept_in_each_directory_and_described(base, tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    mine, directories = Prompting(base, template, (0, 2)), [str(tmp_path / "run"), str(tmp_path / "elsewhere")]
    place, facts = keep(mine, base, tuple(directories))
    assert place == f"{directories[0]}/tokenizer"
    for directory in directories:
        assert AutoTokenizer.from_pretrained(f"{directory}/tokenizer").chat_template == template
        settings = (tmp_path / directory / "tokenizer/generation_config.json").read_text()
        assert json.loads(settings)["eos_token_id"] == [2, 0]
    assert facts["tokenizer"] == base
    assert facts["answers_end_with"] == ["<|endoftext|>", "<|im_end|>"]
    assert facts["chat_template_sha256"] == facts["files"]["chat_template.jinja"]
    assert Prompting.at(place) == Prompting(place, None, (2, 0))
    plain = keep(Prompting(base), base, tuple(directories))[1]
    assert plain["chat_template_sha256"] is None
    assert plain["vocabulary_sha256"] == facts["vocabulary_sha256"]


def test_without_a_directory_it_is_kept_all_the_same(base):
    place, _ = keep(Prompting(tiny.tokenizer()), base, ())
    assert len(AutoTokenizer.from_pretrained(place)) == len(tiny.tokenizer())
    shutil.rmtree(place)


def test_a_directory_that_cannot_be_written(base, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(DestinationError, match="run/tokenizer"):
        keep(Prompting(base), base, (str(tmp_path / "run"),))
