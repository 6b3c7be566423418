"""A run that is killed goes on from its last committed checkpoint, and ends as if nothing had happened."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import ray
import tiny
from loops import Recorder, loop_with, noted, use
from ray.train import FailureConfig, RunConfig, ScalingConfig

from kithara_ray import Checkpointer, Dataloader, KerasHubModel, MeshShape, SFTDataset, Trainer
from kithara_ray.checkpoint import disk_format
from kithara_ray.checkpoint.run_files import read_trained
from kithara_ray.hf.adapter import Adapter
from kithara_ray.storage.places import Place

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS, EVERY = 8, 3


def make_trainer(directory, out, workers=2, devices=2, failures=0, lora=None, rows=tiny.rows, **kwargs):
    """22 rows in batches of 8: the epoch turns twice, and dropout depends on the step."""
    lora = dict(lora_alpha=12, lora_dropout=0.1) | (lora or {})
    model = KerasHubModel.from_preset(str(directory), lora_rank=4, precision="float32", **lora)
    data = SFTDataset(rows(22), tokenizer_handle=str(directory), max_seq_len=64)
    held_out = SFTDataset(rows(5), tokenizer_handle=str(directory))
    options = dict(
        seed=2,
        checkpointer=Checkpointer(out / "checkpoints", save_interval_steps=EVERY, max_to_keep=2),
        mesh=MeshShape(),  # weights cross processes
    )
    return Trainer(
        model=model,
        optimizer=keras.optimizers.AdamW(keras.optimizers.schedules.PolynomialDecay(1e-2, STEPS, 1e-3)),
        train_dataloader=Dataloader(data, per_device_batch_size=8 // (workers * devices), seed=1),
        eval_dataloader=Dataloader(held_out, per_device_batch_size=1),
        eval_steps_interval=4,
        steps=STEPS,
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=str(out / "runs"), failure_config=FailureConfig(max_failures=failures)),
        cpu_devices_per_worker=devices,
        progress=False,
        **{**options, **kwargs},
    )


def killed_before(step, rank, once):
    """A loop of which one rank dies by SIGKILL before a step, the first time."""

    def kill(run):
        if run.number == step and run.rank == rank and not Path(once).exists():
            Path(once).touch()
            run.saving.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    return loop_with(before_step=kill)


def losses(result):
    return {row["step"]: row["loss"] for row in result.history}


@pytest.fixture(scope="module")
def undisturbed(cluster, tiny_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    trainer = make_trainer(tiny_models["llama"], out)
    return out, trainer, trainer.train()


def test_a_killed_rank_goes_on_from_its_checkpoint(cluster, tiny_models, tmp_path, monkeypatch):
    """kill -9 of one of two ranks before step 6, whose step 3 is committed: what is done again has the same bits.

    ./test_run.py has the bits of the adapter at the end.
    """
    use(killed_before(6, rank=1, once=str(tmp_path / "killed")), monkeypatch)
    told = tmp_path / "told.jsonl"
    trainer = make_trainer(tiny_models["llama"], tmp_path, failures=1, callbacks=[Recorder(told)])
    result = trainer.train()
    assert (tmp_path / "killed").exists()
    assert [row["step"] for row in result.history] == list(range(1, STEPS + 1))
    assert [row["step"] for row in result.eval_history] == [4, 8]
    assert [step for _, _, step, _, _ in noted(told, "start")] == [0, 3]
    twice = {}
    for step, metrics in noted(told, "step"):
        twice.setdefault(step, []).append(metrics["loss"])
    again = [step for step, seen in twice.items() if len(seen) == 2]
    assert again
    assert set(again) <= {4, 5}
    assert all(len(set(twice[step])) == 1 for step in again)
    saved = read_trained(str(tmp_path / "checkpoints")).adapter.tensors
    assert all(np.array_equal(trainer.model.adapter[name], tensor) for name, tensor in saved.items())


@pytest.mark.long
def test_resumed_on_another_number_of_hosts_and_another_mesh(undisturbed, tiny_models, tmp_path):
    """Step 6 of two workers of two devices that split the weights, to the end on one worker whose two devices do not,
    as a small model has it by default."""
    out, reference, expected = undisturbed
    where = Place(str(out / "checkpoints"))
    shutil.copytree(out / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / disk_format.committed(where)[0])
    trainer = make_trainer(tiny_models["llama"], tmp_path, workers=1, mesh=None)
    result = trainer.train()
    axes = json.loads((Path(result.path) / "run.json").read_text())["mesh"]
    assert (axes["data"], axes["fsdp"]) == (2, 1)
    assert [row["step"] for row in result.history] == list(range(1, STEPS + 1))
    assert losses(result)[6] == losses(expected)[6]
    assert losses(result)[8] == pytest.approx(losses(expected)[8], rel=1e-5)
    for name, tensor in reference.model.adapter.items():
        np.testing.assert_allclose(trainer.model.adapter[name], tensor, atol=1e-6, err_msg=name)


# Every option of PEFT that trains more than factors, or factors of some layers; two tokens have no rows in the base.
OPTIONS = dict(
    target_modules=["q_proj", "k_proj"],
    layers_to_transform=[0, 2],
    exclude_modules=["2.self_attn.k_proj"],
    bias="all",
    lora_bias=True,
    modules_to_save=["lm_head"],
)


def rows_with_added(count):
    return [{**row, "prompt": f"<a> {row['prompt']}", "answer": f"{row['answer']} <b>"} for row in tiny.rows(count)]


@pytest.mark.long
def test_every_option_of_peft_is_resumed_and_decoded(cluster, tmp_path, monkeypatch):
    """Two ranks that split the weights; one dies by kill -9. PEFT and transformers continue prompts as `generate`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("KITHARA_RAY_CACHE", str(tmp_path / "cache"))
    known = len(tiny.tokenizer())
    directory = tiny.write_model(tmp_path / "base", "qwen2", tie_word_embeddings=False, vocab_size=known)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.add_tokens(["<a>", "<b>"]) == 2
    tokenizer.save_pretrained(directory)
    lora = OPTIONS | dict(trainable_token_indices=[known, 5, known + 1], resize_token_embeddings=len(tokenizer))
    use(killed_before(6, rank=1, once=str(tmp_path / "killed")), monkeypatch)
    told = tmp_path / "told.jsonl"
    trainer = make_trainer(
        directory, tmp_path, devices=1, failures=1, lora=lora, rows=rows_with_added, callbacks=[Recorder(told)]
    )
    result = trainer.train()
    model = trainer.model
    assert (tmp_path / "killed").exists()
    assert [row["step"] for row in result.history] == list(range(1, STEPS + 1))
    assert [step for _, _, step, _, _ in noted(told, "start")] == [0, 3]
    saved = read_trained(str(tmp_path / "checkpoints")).adapter
    assert saved.config == model.lora
    assert saved.tensors.keys() == model.adapter.keys()
    assert all(np.array_equal(model.adapter[name], tensor) for name, tensor in saved.tensors.items())
    kinds = {name.rpartition("layers.")[2][2:] if "layers." in name else name for name in model.adapter}
    assert {"self_attn.k_proj.lora_B.bias", "self_attn.v_proj.bias", "self_attn.q_proj.base_layer.bias"} <= kinds
    assert {"lm_head.weight", "model.embed_tokens.token_adapter.trainable_tokens_delta"} <= kinds
    assert "model.layers.2.self_attn.k_proj.lora_A.weight" not in model.adapter

    ids = [tokenizer(text)["input_ids"] for text in ("<a> what is 1 + 2 ?", "<b> 0 1 <a>")]
    ours = model.generate(ids, max_length=30, return_decoded=False)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    plain.resize_token_embeddings(len(tokenizer))
    model.save_in_hf_format(str(tmp_path / "merged"))
    tuned = PeftModel.from_pretrained(plain, f"{result.path}/adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for reference in (tuned, merged):
        for given, found in zip(ids, ours, strict=True):
            answer = reference.generate(input_ids=torch.tensor([given]), max_length=30, do_sample=False)
            assert answer[0].tolist() == found
    written = Adapter.read(f"{result.path}/adapter")
    assert written.tensors.keys() == model.adapter.keys()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == merged.config.vocab_size == known + 2
