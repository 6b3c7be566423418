"""A run with a tokenizer, template and end of answers of its own: whatever is exported of it has these."""

import json

import keras
import pytest
import tiny
from ray.train import RunConfig
from transformers import AutoTokenizer

from kithara_ray import Checkpointer, Dataloader, KerasHubModel, SFTDataset, Trainer
from kithara_ray.cli import main
from kithara_ray.errors import DataError

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "what is 1 + 2 ?"}]


@pytest.fixture
def base(tmp_path):
    """As many bases are: texts end with <|endoftext|>, and there is no chat template."""
    directory = tiny.write_model(tmp_path / "base", "llama")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": 0, "repetition_penalty": 1.1}')
    return directory


@pytest.mark.long
def test_every_export_has_the_tokenizer_of_the_training(cluster, base, tmp_path, caplog):
    (tmp_path / "my.jinja").write_text(TEMPLATE)
    rows = [{"messages": [*CHAT, {"role": "assistant", "content": text}]} for text in ("three", "seven two", "one")]
    data = SFTDataset(rows, tokenizer_handle=str(base), max_seq_len=64, chat_template=str(tmp_path / "my.jinja"))
    model = KerasHubModel.from_preset(str(base), lora_rank=2, precision="float32")
    with pytest.raises(DataError, match="no chat template"):
        model.generate(CHAT)
    Trainer(
        model=model,
        optimizer=keras.optimizers.AdamW(1e-2),
        train_dataloader=Dataloader(data, per_device_batch_size=2),
        steps=2,
        checkpointer=Checkpointer(str(tmp_path / "saved")),
        run_config=RunConfig(storage_path=str(tmp_path / "runs"), name="r"),
        export_every_steps=1,
        export_dir=str(tmp_path / "snapshots"),
        progress=False,
    ).train()
    run = tmp_path / "runs/r"
    told = json.loads((run / "run.json").read_text())["tokenizer"]
    assert told["answers_end_with"] == ["<|im_end|>"]
    assert told["chat_template_sha256"] == told["files"]["chat_template.jinja"]
    layouts = {"adapter": dict(only_save_adapters=True), "separate": dict(save_adapters_separately=True), "merged": {}}
    for name, options in layouts.items():
        model.save_in_hf_format(str(tmp_path / name), **options)
    for source, name in ((run, "of_run"), (tmp_path / "saved", "of_checkpoints")):
        assert main(["export", str(source), f"--to={tmp_path / name}", f"--base={base}"]) == 0
    assert (
        main(["merge", f"--base={base}", f"--adapter={tmp_path / 'adapter'}", f"--to={tmp_path / 'of_adapter'}"]) == 0
    )
    for name in (*layouts, "of_run", "of_checkpoints", "of_adapter", "snapshots/step-000001"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == TEMPLATE, name
        settings = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert settings == {"eos_token_id": [0, 2], "repetition_penalty": 1.1}, name
        assert str(tmp_path) not in (tmp_path / name / "run.json").read_text(), name
    assert model.prompting.ends == (2,)
    (ids,) = model.generate(CHAT, max_length=60, return_decoded=False)
    prompt = AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(CHAT, add_generation_prompt=True)
    assert ids[: len(prompt["input_ids"])] == list(prompt["input_ids"])
    assert "ignores repetition_penalty=1.1 of generation_config.json" in caplog.text
    again = KerasHubModel.from_preset(str(base), adapter=str(tmp_path / "adapter"), precision="float32")
    assert again.generate(CHAT, max_length=60, return_decoded=False) == [ids]
    again.release()
    model.release()
