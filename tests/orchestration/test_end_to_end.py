"""The main job on tiny models: two Ray Train workers share one sharded model; what is exported is what was trained."""

import json

import keras
import numpy as np
import pytest
import tiny
import torch
from loops import use
from observed import HELD_OUT, LAST, LAYERS, TOKENS, save_all, train_then_write_logits
from peft import PeftModel
from ray.train import RunConfig, ScalingConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from kithara_ray import Dataloader, KerasHubModel, MeshShape, SFTDataset, Trainer
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint


def run(
    directory,
    tmp_path,
    workers,
    devices,
    rows_per_device,
    loop=None,
    targets=("q_proj", "v_proj"),
    packing=False,
    options=None,
    rows=None,
    **kwargs,
):
    """Train on 22 rows: batches of 8, the last of each epoch not full."""
    model = KerasHubModel.from_preset(
        str(directory), lora_rank=4, lora_alpha=12, target_modules=targets, precision="float32", **(options or {})
    )
    data = SFTDataset(rows or tiny.rows(22), tokenizer_handle=str(directory), max_seq_len=64)
    trainer = Trainer(
        model=model,
        optimizer=keras.optimizers.AdamW(1e-2, weight_decay=0.01),
        train_dataloader=Dataloader(data, per_device_batch_size=rows_per_device, seed=1, packing=packing),
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=str(tmp_path), name=f"{workers}x{devices}"),
        cpu_devices_per_worker=devices,
        mesh=MeshShape(),  # weights cross processes
        progress=False,
        **{"steps": 7, **kwargs},
    )
    return model, trainer.train()


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@pytest.fixture(scope="module", params=["llama", pytest.param("gemma2", marks=pytest.mark.long)])
def trained(request, cluster, tiny_models, tmp_path_factory):
    """One run on two workers of two devices, and its three exports: (its base, where they are, its model, its result).

    The llama's is the run that other files look at too.
    """
    if request.param == "llama":
        observed = request.getfixturevalue("observed")
        yield observed.directory, observed.root, observed.model, observed.result
        observed.model.release()
        return
    directory, out = tiny_models[request.param], tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        use(train_then_write_logits(out / "logits.npy"), patch)
        model, result = run(
            directory, out / "runs", workers=2, devices=2, rows_per_device=2, targets=LAYERS, steps=LAST
        )
    save_all(model, out)
    yield directory, out, model, result
    model.release()


def test_the_run_learned_and_trained_every_factor(trained):
    _, _, model, result = trained
    assert [row["step"] for row in result.history] == list(range(1, LAST + 1))
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    assert all(np.abs(tensor).max() > 1e-3 for name, tensor in model.adapter.items())
    assert {name.split(".")[-3] for name in model.adapter} == set(LAYERS)
    assert {"tokenize", "schedule", "import", "build", "load", "compile", "first_step"} <= result.phases.keys()


def test_sharded_logits_equal_peft_on_the_exported_adapter(trained):
    directory, out, _, _ = trained
    base = AutoModelForCausalLM.from_pretrained(directory)
    plain = logits_of(base)
    reference = logits_of(PeftModel.from_pretrained(base, out / "adapter"))
    ours = np.load(out / "logits.npy")
    np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=0)
    assert np.abs(ours - plain).max() > 0.1


def test_merged_export_is_bit_identical_to_merge_and_unload(trained):
    directory, out, _, _ = trained
    threads = torch.get_num_threads()
    # torch's sgemm rounds differently with many threads where a width is not a multiple of 16.
    torch.set_num_threads(1)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), out / "adapter")
    reference = peft.merge_and_unload().state_dict()
    torch.set_num_threads(threads)
    merged, base = BaseCheckpoint.open(out / "merged"), BaseCheckpoint.open(directory)
    assert merged.names == base.names
    for name in merged.names:
        assert merged.view(name).tobytes() == reference[name].numpy().tobytes(), name
    changed = {name for name in base.names if merged.view(name).tobytes() != base.view(name).tobytes()}
    assert {name.split(".")[-2] for name in changed} == set(LAYERS)
    report = json.loads((out / "merged" / "export_report.json").read_text())
    assert any(check.startswith("logits of 32 tokens: the merged model's differ by") for check in report["checks"])


def test_base_and_adapter_load_in_transformers(trained):
    directory, out, _, _ = trained
    model = AutoModelForCausalLM.from_pretrained(out / "both")
    plain = logits_of(model)
    np.testing.assert_array_equal(plain, logits_of(AutoModelForCausalLM.from_pretrained(directory)))
    model.load_adapter(str(out / "both" / "adapter"))
    np.testing.assert_allclose(logits_of(model), np.load(out / "logits.npy"), atol=1e-4, rtol=0)


def test_the_run_directory_holds_the_adapter(trained):
    _, _, model, result = trained
    written = Adapter.read(f"{result.path}/adapter")
    assert written.tensors.keys() == model.adapter.keys()
    assert all((written.tensors[name] == model.adapter[name]).all() for name in model.adapter)


def test_generate_is_transformers_greedy(trained):
    directory, out, model, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    prompts = ["what is 1 + 2 ?", "the sum of two and five", "0 1 2"]
    ours = model.generate(prompts, max_length=30, return_decoded=False)
    for prompt, ids in zip(prompts, ours, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = reference.generate(**inputs, max_length=30, do_sample=False)[0].tolist()
        assert ids == expected
    texts = model.generate(prompts[0], max_length=30, strip_prompt=True)
    assert texts == [tokenizer.decode(ours[0][len(tokenizer(prompts[0])["input_ids"]) :], skip_special_tokens=True)]


def test_the_evaluation_is_transformers_loss_on_what_was_trained(observed):
    """By tokens, each of 5 rows once, though a batch has 4."""
    evaluation = observed.result.eval_history[-1]
    assert evaluation["step"] == LAST
    assert_is_evaluation(evaluation, observed.directory, observed.root / "adapter", HELD_OUT)


def assert_is_evaluation(evaluation, directory, adapter, rows):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), adapter)
    total = count = 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = adapted.eval()(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    assert evaluation["eval_tokens"] == count
    assert evaluation["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert evaluation["eval_perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)


@pytest.mark.long
def test_dora_on_an_int8_base_over_two_hosts(cluster, tiny_models, tmp_path, monkeypatch):
    """Computed on the base as int8; exported for, and merged into, the base as it is."""
    directory, targets = tiny_models["llama"], r".*(q|up|down)_proj"
    use(train_then_write_logits(tmp_path / "logits.npy"), monkeypatch)
    options = dict(use_dora=True, quantize="int8")
    model, result = run(directory, tmp_path / "runs", 2, 2, 2, targets=targets, options=options)
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    model.save_in_hf_format(tmp_path / "adapter", only_save_adapters=True)
    model.save_in_hf_format(tmp_path / "merged")

    held = AutoModelForCausalLM.from_pretrained(directory)
    for name, module in held.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            scale = module.weight.data.abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale
    trained = logits_of(PeftModel.from_pretrained(held, tmp_path / "adapter"))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), trained, atol=2e-4, rtol=0)

    base = AutoModelForCausalLM.from_pretrained(directory)
    plain, threads = logits_of(base), torch.get_num_threads()
    torch.set_num_threads(1)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    torch.set_num_threads(threads)
    written = BaseCheckpoint.open(tmp_path / "merged")
    for name, tensor in merged.state_dict().items():
        if name in written.tensors:
            assert written.view(name).tobytes() == tensor.numpy().tobytes(), name
    exported = logits_of(merged)
    # What the rounding of the base leaves between the two is less than what was trained.
    assert 0 < np.linalg.norm(exported - trained) < 0.5 * np.linalg.norm(exported - plain)


@pytest.mark.long
def test_losses_do_not_depend_on_the_number_of_workers(cluster, tiny_models, tmp_path):
    """Same data, seed and global batch of 8: one worker of four devices, and two of two. Some rows are so long that
    batches have two lengths."""
    long = [{"prompt": "one", "answer": f"{i} " * 60} for i in range(300)]
    losses = {}
    for workers, devices in ((1, 4), (2, 2)):
        rows_per_device = 8 // (workers * devices)
        _, result = run(tiny_models["llama"], tmp_path, workers, devices, rows_per_device, rows=tiny.rows(450) + long)
        losses[workers, devices] = [row["loss"] for row in result.history]
        tokens = [row["tokens_per_s"] * row["step_time_s"] for row in result.history]
        assert max(tokens) > 400 > min(tokens), tokens
    np.testing.assert_allclose(losses[2, 2], losses[1, 4], rtol=1e-4)
    assert len(set(losses[1, 4])) == 7


@pytest.mark.long
def test_packed_epochs_and_an_evaluation_on_two_workers(cluster, tiny_models, tmp_path):
    """22 rows twice, several to a sequence: every token once an epoch. Then the loss over 5 rows in batches of 4, each
    row once, by tokens, against transformers on what was trained."""
    directory, held_out = tiny_models["llama"], HELD_OUT
    loader = Dataloader(SFTDataset(held_out, tokenizer_handle=str(directory)), per_device_batch_size=1)
    _, result = run(
        directory,
        tmp_path,
        2,
        2,
        1,
        packing=True,
        steps=None,
        epochs=2,
        eval_dataloader=loader,
        eval_epochs_interval=2,
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = sum(
        len(tokenizer(row["prompt"])["input_ids"]) + len(tokenizer(row["answer"])["input_ids"]) + 1
        for row in tiny.rows(22)
    )
    seen = sum(row["tokens_per_s"] * row["step_time_s"] for row in result.history)
    assert seen == pytest.approx(2 * tokens, abs=0.01)
    # Sequences of 64 tokens hold several rows: one to a sequence would be 12 steps of 4.
    assert len(result.history) <= 6
    assert result.history[-1]["epoch"] == 2
    assert result.history[-1]["loss"] < result.history[0]["loss"]

    (evaluation,) = result.eval_history
    assert_is_evaluation(evaluation, directory, f"{result.path}/adapter", held_out)
