"""All weights trained by two Ray Train workers that share them: what is exported is what was trained."""

import json
import shutil
import sys

import keras
import numpy as np
import pytest
import ray
import tiny
import torch
from loops import loop_with, use, writes_logits
from ray.train import RunConfig, ScalingConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from kithara_ray import Dataloader, KerasHubModel, MeshShape, SFTDataset, Trainer
from kithara_ray.errors import ConfigError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.orchestration import generator_group

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TOKENS = np.random.default_rng(0).integers(3, tiny.VOCABULARY, (4, 24)).astype(np.int32)
PROMPTS = ["what is 1 + 2 ?", "the sum of two and five", "0 1 2"]


def train(model, storage, workers=2, devices=2, name="first"):
    data = SFTDataset(tiny.rows(22), tokenizer_handle=model.preset_handle, max_seq_len=64)
    trainer = Trainer(
        model=model,
        optimizer=keras.optimizers.AdamW(3e-3, weight_decay=0.01),
        train_dataloader=Dataloader(data, per_device_batch_size=8 // (workers * devices), seed=1),
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=str(storage), name=name),
        cpu_devices_per_worker=devices,
        mesh=MeshShape(),  # weights cross processes
        progress=False,
        steps=5,
    )
    return trainer.train()


def train_then_write_logits(path):
    """A loop that afterwards writes what the sharded model computes."""

    def check_split(run):
        assert not run.frozen
        assert any(not array.is_fully_addressable for array in run.state["params"].values())

    return loop_with(built=check_split, trained=writes_logits(path, TOKENS))


def logits_of(directory) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@pytest.fixture(scope="module")
def trained(cluster, tiny_models, tmp_path_factory):
    """One run on two workers of two devices, and its export. The base is in several files."""
    out = tmp_path_factory.mktemp("full")
    directory = out / "base"
    shutil.copytree(tiny_models["llama"], directory)
    (directory / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).save_pretrained(directory, max_shard_size="150KB")
    model = KerasHubModel.from_preset(str(directory), precision="float32")
    with pytest.MonkeyPatch.context() as patch:
        use(train_then_write_logits(out / "logits.npy"), patch)
        result = train(model, out / "runs")
    model.save_in_hf_format(out / "export")
    yield directory, out, model, result
    model.release()


def test_exported_logits_are_those_of_the_trained_weights(trained):
    directory, out, _, result = trained
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    ours = np.load(out / "logits.npy")
    np.testing.assert_allclose(logits_of(out / "export"), ours, atol=1e-4, rtol=0)
    assert np.abs(logits_of(directory) - ours).max() > 0.1


def test_the_export_has_the_base_s_files_and_every_tensor_changed(trained):
    directory, out, model, result = trained
    export, base = BaseCheckpoint.open(out / "export"), BaseCheckpoint.open(directory)
    where = lambda one: {n: (i.file.name, i.offset, i.dtype, i.shape) for n, i in one.tensors.items()}  # noqa: E731
    assert where(export) == where(base)
    assert len(base.files) > 2
    for name in base.names:
        moved = np.abs(export.view(name).astype(np.float32) - base.view(name)).max()
        assert 1e-4 < moved < 0.1, name
    for name in ("config.json", "tokenizer.json"):
        assert (out / "export" / name).read_bytes() == (directory / name).read_bytes()
    report = json.loads((out / "export" / "export_report.json").read_text())
    assert report["tensors"] == {"trained": len(base.names)}
    assert json.loads((out / "export" / "run.json").read_text())["optimizer"] == "AdamW"
    assert model.trained == f"{result.path}/model"
    assert not list((out / "runs" / "first").glob(".*staging*"))


def test_generate_goes_on_from_the_trained_weights(trained):
    directory, out, model, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = AutoModelForCausalLM.from_pretrained(out / "export").eval()
    ours = model.generate(PROMPTS, max_length=30, return_decoded=False)
    for prompt, ids in zip(PROMPTS, ours, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        assert ids == reference.generate(**inputs, max_length=30, do_sample=False)[0].tolist()


def generate_where_weights_cross_processes(config):
    from kithara_ray.orchestration.decoding import Decoding

    spec = config["spec"]
    decoding = Decoding(spec.weights, spec.mesh)
    assert any(not array.is_fully_addressable for array in decoding.decoder.frozen)
    return decoding.generate(spec.request)


@pytest.mark.long
def test_generate_on_workers_that_share_the_weights(trained, monkeypatch):
    """Texts, a chat and ids at once, five rows on four devices; greedy texts are transformers'."""
    directory, out, model, _ = trained
    monkeypatch.setattr(generator_group, "GENERATE_LOOP", generate_where_weights_cross_processes)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    chat = [{"role": "user", "content": "seven"}]
    inputs = [*PROMPTS, chat, tokenizer("nine")["input_ids"]]
    texts = model.generate(
        inputs,
        max_length=30,
        strip_prompt=True,
        tokenizer=tokenizer,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(out / "runs"), name="generate"),
        cpu_devices_per_worker=2,
        mesh=MeshShape(),
    )
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    ids += [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False), inputs[-1]]
    reference = AutoModelForCausalLM.from_pretrained(out / "export").eval()
    for prompt, text in zip(ids, texts, strict=True):
        wanted = reference.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_length=30)
        assert text == tokenizer.decode(wanted[0, len(prompt) :], skip_special_tokens=True)
    assert len(set(texts)) > 1


def test_there_is_no_adapter_to_save(trained):
    _, out, model, _ = trained
    for layout in ({"only_save_adapters": True}, {"save_adapters_separately": True}):
        with pytest.raises(ConfigError, match="all weights of this model are trained, so there is no adapter"):
            model.save_in_hf_format(out / "adapter", **layout)
    assert not (out / "adapter").exists()


@pytest.mark.long
def test_training_goes_on_and_is_exported_again(trained):
    """Under the same run name: what it began from stays."""
    _, out, model, first = trained
    result = train(model, out / "runs", workers=1, devices=2)
    assert result.history[0]["loss"] < first.history[-1]["loss"]
    assert model.trained == f"{result.path}/model-2"
    model.save_in_hf_format(out / "again", dtype="bfloat16")
    again, state = BaseCheckpoint.open(out / "again"), BaseCheckpoint.open(model.trained)
    before = BaseCheckpoint.open(first.path + "/model")
    for name in state.names:
        assert again.tensors[name].dtype == "BF16"
        assert (again.view(name) == state.view(name).astype(again.view(name).dtype)).all()
        assert (before.view(name) != state.view(name)).any()
    assert json.loads((out / "again" / "config.json").read_text())["dtype"] == "bfloat16"
