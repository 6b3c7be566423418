import copy
import json
import re
import shutil
import subprocess
import sys

import pytest

from kithara_ray.errors import DataError
from kithara_ray.sft.tokens.tokenizer import SpecialTokens, load_tokenizer


def test_bos_is_what_the_tokenizer_adds_not_what_it_names(tokenizers):
    assert tokenizers["chat"].bos_token == "<|im_start|>"
    assert SpecialTokens.of(tokenizers["chat"]).bos_id is None
    for kind, bos in (("llama3", "<|begin_of_text|>"), ("sentencepiece", "<bos>")):
        special = SpecialTokens.of(tokenizers[kind])
        assert special.bos_id == tokenizers[kind].convert_tokens_to_ids(bos), kind


def test_pad_falls_back_to_eos(tokenizers):
    assert tokenizers["llama3"].pad_token_id is None
    special = SpecialTokens.of(tokenizers["llama3"])
    assert special.pad_id == special.eos_id == tokenizers["llama3"].convert_tokens_to_ids("<|end_of_text|>")
    special = SpecialTokens.of(tokenizers["sentencepiece"])
    assert special.pad_id == tokenizers["sentencepiece"].convert_tokens_to_ids("<pad>") != special.eos_id


def test_pad_of_id_0_is_kept(tokenizers):
    assert SpecialTokens.of(tokenizers["sentencepiece"]).pad_id == 0


def test_eos_is_required(tokenizers):
    without = copy.deepcopy(tokenizers["llama3"])
    without.eos_token = None
    with pytest.raises(DataError, match=r"has no EOS token, so no answer would end; set tokenizer\.eos_token"):
        SpecialTokens.of(without)


def test_load_from_directory_once_a_process(tokenizer_directories, tokenizers, kind):
    handle = str(tokenizer_directories[kind])
    loaded = load_tokenizer(handle)
    assert loaded("the answer")["input_ids"] == tokenizers[kind]("the answer")["input_ids"]
    assert load_tokenizer(handle) is loaded


def test_the_template_of_a_processor_is_read_where_the_tokenizer_has_none(tmp_path, tokenizer_directories):
    place = tmp_path / "model"
    shutil.copytree(tokenizer_directories["llama3"], place)
    for name in ("chat_template.jinja", "chat_template.json"):
        (place / name).unlink(missing_ok=True)
    config = json.loads((place / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(place)).chat_template is None
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for number, (held, found) in enumerate(
        [({"chat_template": template}, template), ({"chat_template": None}, None), ([], None)]
    ):
        other = tmp_path / str(number)
        shutil.copytree(place, other)
        (other / "chat_template.json").write_text(json.dumps(held))
        if found is None:
            with pytest.raises(DataError, match=r"chat_template\.json of .* holds no template \("):
                load_tokenizer(str(other))
            continue
        assert load_tokenizer(str(other)).chat_template == found
        # The tokenizer's own goes first.
        (tmp_path / "own").mkdir()
        for file in other.iterdir():
            shutil.copy(file, tmp_path / "own")
        (tmp_path / "own" / "chat_template.jinja").write_text("{{ messages[0].content }}")
        assert load_tokenizer(str(tmp_path / "own")).chat_template == "{{ messages[0].content }}"


def test_no_tokenizer_names_handle_and_cause(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match=rf"^no tokenizer at '{re.escape(str(tmp_path))}': \w+: .*tokenizer_handle="):
        load_tokenizer(str(tmp_path))


def test_missing_directory_names_handle(tmp_path):
    handle = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"^no tokenizer at '{re.escape(handle)}': "):
        load_tokenizer(handle)


def test_torn_tokenizer_names_handle(tmp_path, tokenizer_directories):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_directories["chat"] / name).read_bytes())
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"^no tokenizer at '{re.escape(str(tmp_path))}': "):
        load_tokenizer(str(tmp_path))


def test_malformed_model_names_handle(tmp_path, tokenizer_directories):
    content = json.loads((tokenizer_directories["chat"] / "tokenizer.json").read_text())
    content["model"]["type"] = "Nonesuch"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes(
        (tokenizer_directories["chat"] / "tokenizer_config.json").read_bytes()
    )
    with pytest.raises(DataError, match=rf"^no tokenizer at '{re.escape(str(tmp_path))}': "):
        load_tokenizer(str(tmp_path))


def test_importing_the_room_imports_nothing_heavy():
    code = """
import sys
import kithara_ray.sft.batches.collate, kithara_ray.sft.tokens.formats
import kithara_ray.sft.tokens.tokenize, kithara_ray.sft.tokens.tokenizer
heavy = {"torch", "jax", "keras", "keras_hub", "ray", "tensorflow", "transformers"} & set(sys.modules)
sys.exit(f"imported: {sorted(heavy)}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
