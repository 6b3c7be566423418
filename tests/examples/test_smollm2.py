"""The directory against transformers: its own reading of the GGUF file is the independent reference."""

import json
import os
import re
import subprocess
import sys

import pytest
import regex
import smollm2
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def model(smollm2_directory):
    return AutoModelForCausalLM.from_pretrained(smollm2_directory)


@pytest.fixture(scope="module")
def tokenizer(smollm2_directory):
    return AutoTokenizer.from_pretrained(smollm2_directory)


@pytest.fixture(scope="module")
def reference(gguf_path):
    return AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)


def test_answers_a_question(model, tokenizer):
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output_ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(output_ids)
    assert output_ids[-1] == tokenizer.eos_token_id


def test_logits_are_those_of_transformers_own_gguf_reader(model, reference, tokenizer):
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        logits, expected = model(**inputs).logits, reference(**inputs).logits
    assert expected.std() > 1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_those_of_transformers_own_gguf_reader(model, reference):
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name], expected), name


def test_config(model, smollm2_directory):
    config = json.loads((smollm2_directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100_000
    assert config["tie_word_embeddings"] is True
    # What transformers makes of it, in its own spelling.
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000}
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (9, 3, 64)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2


def test_file_is_float32_with_tied_embeddings_and_pt_metadata(smollm2_directory):
    with safe_open(smollm2_directory / "model.safetensors", "np") as file:
        names = list(file.keys())
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert len(names) == 30 * 9 + 2
    assert "lm_head.weight" not in names


def test_special_tokens(tokenizer):
    assert tokenizer.is_fast
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == 49152
    for token_id in range(17):
        token = tokenizer.convert_ids_to_tokens(token_id)
        assert tokenizer.decode([token_id], skip_special_tokens=True) == "", token
        assert tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"][1] == token_id, token
    assert tokenizer.decode([17], skip_special_tokens=True) == "!"


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == PROMPT


def test_no_bos_is_added(tokenizer):
    assert tokenizer("hello")["input_ids"] == tokenizer("hello", add_special_tokens=False)["input_ids"]


def test_digits_are_single_and_words_keep_their_space(tokenizer):
    assert tokenizer("12 ab 345<|im_end|>").tokens() == ["1", "2", "Ġab", "Ġ", "3", "4", "5", "<|im_end|>"]
    assert tokenizer("it's 3x4").tokens() == ["it", "'s", "Ġ", "3", "x", "4"]


@pytest.mark.parametrize(
    "text",
    [
        PROMPT,
        "  two  spaces\n\n\tand a tab, 1234567890 = x",
        "naïve façade, Ελλάδα, 日本語, 한국어, العربية, 🙂👩‍👩‍👧",
        "def f(x):\n    return x ** 2  # don't\r\n",
        " leading and trailing ",
        "<|im_start|><|endoftext|><repo_name>",
        "\u00a0\u200b\ufeff",
    ],
)
def test_round_trip_and_the_same_ids_as_transformers_own_gguf_reader(tokenizer, gguf_tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids == gguf_tokenizer(text)["input_ids"]


def _llama_cpp_pieces(text):
    """What "smollm" stands for in llama.cpp (src/llama-vocab.cpp): single digits first, then GPT-2's pattern.

    transformers' GGUF reader leaves the first step out, which shows in numbers that byte pairs can merge, such as ½.
    """
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return [piece for part in regex.split(r"(\p{N})", text) for piece in regex.findall(gpt2, part)]


@pytest.mark.parametrize("text", ["12 ab 345", " ½ x² 3Ⅳ ٣", "it's  7 o'clock\n\n 8", "a\t 9  \n", "f(x1)=x**2;  #3 "])
def test_pieces_are_those_of_llama_cpp(tokenizer, text):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == _llama_cpp_pieces(text)


@pytest.fixture(scope="module")
def gguf_tokenizer(gguf_path):
    return AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)


def test_written_once(smollm2_directory):
    before = {path.name: path.stat().st_mtime_ns for path in smollm2_directory.iterdir()}
    assert set(before) == set(smollm2.FILES)
    assert smollm2.write_smollm2(str(smollm2_directory)) == smollm2_directory
    assert {path.name: path.stat().st_mtime_ns for path in smollm2_directory.iterdir()} == before
    assert [path.name for path in smollm2_directory.parent.iterdir()] == [smollm2_directory.name]


def test_readable_by_others(smollm2_directory):
    assert smollm2_directory.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in smollm2_directory.iterdir()} == {0o644}


def _write_small_files(source, directory, dtype="float32"):
    for name in smollm2.FILES:
        (directory / name).write_text("written")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, gguf_path):
    def interrupted(source, directory, dtype="float32"):
        (directory / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.write_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled(tmp_path, monkeypatch, gguf_path):
    monkeypatch.setattr(smollm2, "_write", _write_small_files)
    (tmp_path / "model").mkdir()
    assert {path.name for path in smollm2.write_smollm2(tmp_path / "model").iterdir()} == set(smollm2.FILES)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{re.escape(str(tmp_path))} exists and is not the model"):
        smollm2.write_smollm2(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_writers(tmp_path, monkeypatch, gguf_path):
    """The other one finishes while this one writes."""

    def write_and_be_overtaken(source, directory, dtype="float32"):
        _write_small_files(source, directory)
        other = tmp_path / "model"
        other.mkdir()
        for name in smollm2.FILES:
            (other / name).write_text("the other's")

    monkeypatch.setattr(smollm2, "_write", write_and_be_overtaken)
    smollm2.write_smollm2(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "the other's"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_needs_no_torch(gguf_path):
    """Making the model imports no torch, transformers or jax; writing half a gigabyte again is not what is tested."""
    code = """
import sys
import smollm2, gguf
reader = gguf.GGUFReader(smollm2._gguf_path())
smollm2._config(lambda key: reader.fields[key].contents())
from tokenizers import Tokenizer
sys.exit(f"imported: {sorted({'torch', 'transformers', 'jax', 'ray'} & set(sys.modules))}"
         if {"torch", "transformers", "jax", "ray"} & set(sys.modules) else 0)
"""
    environment = {**os.environ, "PYTHONPATH": str(smollm2.__file__).rpartition(os.sep)[0]}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
