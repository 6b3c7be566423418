"""Each of examples/ as a user starts it, two steps long, on a tiny model; what it writes is loaded by others."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch
from doc_pages import blocks
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
TESTED = {"quickstart", "arithmetic", "smollm2", "sft_lora"}  # by tests/examples and driver/test_jobs.py
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model whose tokenizer has a chat template."""
    directory = tiny.write_model(tmp_path_factory.mktemp("base"), "llama")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def foreign(base, tmp_path_factory):
    """An adapter that PEFT has made and saved, with B that is not zero."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("foreign")
    model.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def run(cluster, capsys, monkeypatch):
    """Runs an example in this process, which has joined a cluster; returns what it printed."""

    def start(name: str, *arguments: object) -> str:
        monkeypatch.setenv("STEPS", "2")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return start


def adapter_of(directory: Path, base: Path):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory).peft_config["default"]


@pytest.mark.long
def test_alpaca(run, base, tmp_path):
    rows = [
        {"instruction": row["prompt"], "input": "" if number % 2 else "small numbers", "output": row["answer"]}
        for number, row in enumerate(tiny.rows(12))
    ]
    shown = run("alpaca", base, lines(tmp_path / "rows.jsonl", rows), tmp_path / "adapter")
    # What is learned is marked: the answer alone.
    assert "### Input:\nsmall numbers\n\n### Response:\n« zero<|im_end|>»" in shown
    adapter = adapter_of(tmp_path / "adapter", base)
    assert (adapter.r, adapter.lora_alpha, len(adapter.target_modules)) == (16, 32, 7)


def test_chat(run, base, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in tiny.rows(12)
    ]
    shown = run("chat", base, lines(tmp_path / "rows.jsonl", rows), tmp_path / "merged")
    assert "assistant\n« zero<|im_end|>" in shown
    assert "answer: " in shown
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    changed = {name for name in original if not torch.equal(merged[name], original[name])}
    assert {name.split(".")[-2] for name in changed} == set(tiny.TARGETS["llama"])


@pytest.mark.long
def test_full_finetune(run, base, tmp_path):
    data = lines(tmp_path / "rows.jsonl", tiny.rows(12))
    shown = run("full_finetune", base, data, tmp_path / "out")
    assert f"checkpoint: {tmp_path / 'out' / 'checkpoints'}" in shown
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    trained = load_file(tmp_path / "out" / "model" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    assert all(not torch.equal(trained[name], original[name]) for name in original)


@pytest.mark.long
def test_continued_pretraining(run, base, tmp_path):
    for name in ("train", "eval"):
        (tmp_path / f"{name}.txt").write_text("\n".join(row["prompt"] + row["answer"] for row in tiny.rows(40)))
    shown = run("continued_pretraining", base, tmp_path / "train.txt", tmp_path / "eval.txt", tmp_path / "adapter")
    assert shown.count("perplexity") == 2
    assert adapter_of(tmp_path / "adapter", base).r == 64


@pytest.mark.long
def test_continue_adapter(run, base, foreign, tmp_path):
    data = lines(tmp_path / "rows.jsonl", tiny.rows(12))
    run(
        "continue_adapter",
        base,
        foreign,
        data,
        tmp_path / "adapter",
    )
    before, after = (load_file(path / "adapter_model.safetensors") for path in (foreign, tmp_path / "adapter"))
    assert before.keys() == after.keys()
    for name in before:
        assert 0 < (before[name] - after[name]).abs().max() < 0.01  # Adam's steps, from where PEFT's ended


def test_load_with_peft(run, base, foreign):
    shown = run("load_with_peft", base, foreign, "what is 1 + 2 ?")
    assert shown.startswith("what is 1 + 2 ?")


@pytest.mark.long
def test_the_page_on_lora(cluster, base, tmp_path, monkeypatch):
    """docs/lora.md, its Python in order: what it trains loads in the four ways that it shows, to the same logits."""
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "train.jsonl", tiny.rows(12))
    text = "".join(blocks(EXAMPLES.parent / "docs" / "lora.md", "python")).replace("steps=100", "steps=2")
    for written, ours in (("hf://google/gemma-2-2b", base), ("google/gemma-2-2b", base), ("/data", tmp_path)):
        text = text.replace(f'"{written}', f'"{ours}')
    page = {}
    exec(compile(text, "docs/lora.md", "exec"), page)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits = [page[name].eval()(ids).logits for name in ("tuned", "one", "two", "three")]
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-4, rtol=0)
    assert (logits[0] - plain).abs().max() > 1e-3
    assert page["again"].lora.r == 16


def test_no_example_is_forgotten():
    run_here = set(re.findall(r'run\(\s*"(\w+)"', Path(__file__).read_text()))
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= run_here | TESTED
