"""Searches on a local cluster: the right trial wins, whatever dies on the way, and nothing is left behind."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import keras
import pytest
import ray
import tiny
import torch
from peft import PeftModel
from ray.train import RunConfig, ScalingConfig
from ray.util.state import list_actors, list_placement_groups
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from kithara_ray import Dataloader, KerasHubModel, SFTDataset, Trainer
from kithara_ray.cli import main
from kithara_ray.errors import ConfigError
from kithara_ray.orchestration import submit, tune
from kithara_ray.yaml_file import read_yaml

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS, LENGTH = 3, 64
ROWS, HELD_OUT = tiny.rows(12), tiny.rows(7)
# A learning rate, and what happens to the trial's processes before its last step, the first time.
CASES = [(0.0, None), (3e-2, "driver"), (1e-6, None), (1e-3, "worker"), (30.0, None), (1e-2, None)]
BEST = CASES[1][0]


def killed(fate: str, driver: int, once: Path):
    """The workers' own loop, in which a process of the trial dies by SIGKILL before the last step, the first time."""

    def loop(config):
        from kithara_ray.model import runtime
        from kithara_ray.orchestration.worker import Run

        runtime.prepare()
        run = Run(config["spec"], time.monotonic())
        run.build()
        compiled = getattr(run, "step", None)

        def doomed(*arguments):
            if run.number == STEPS and not once.exists():
                run.saving.saver.wait()
                once.touch()
                os.kill(os.getpid() if fate == "worker" else driver, signal.SIGKILL)
                threading.Event().wait(300)  # a worker whose driver is gone is not to end by itself
            return compiled(*arguments)

        run.step = doomed
        run.train()
        return run.finish()

    return loop


def factory(base: str, out: Path):
    def make(point: dict) -> Trainer:
        if point["case"] == "never":
            raise ConfigError("this point cannot be trained")
        learning_rate, fate = CASES[point["case"]]
        if fate is not None:
            from kithara_ray.orchestration import trainer

            trainer.train_loop = killed(fate, os.getpid(), out / f"killed-{fate}")
        model = KerasHubModel.from_preset(base, lora_rank=4, precision="float32")
        rows = SFTDataset(ROWS, tokenizer_handle=base, max_seq_len=LENGTH)
        held_out = SFTDataset(HELD_OUT, tokenizer_handle=base, max_seq_len=LENGTH)
        return Trainer(
            model=model,
            optimizer=keras.optimizers.AdamW(learning_rate, weight_decay=0.0),
            train_dataloader=Dataloader(rows, per_device_batch_size=4),
            eval_dataloader=Dataloader(held_out, per_device_batch_size=4),
            steps=STEPS,
            eval_steps_interval=1,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name="search", storage_path=str(out)),
        )

    return make


def torch_loss(base: str, adapter: str) -> float:
    """The mean loss over the answers of the held-out rows, by transformers and PEFT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    tokenizer, total, count = tiny.tokenizer(), 0.0, 0
    for row in HELD_OUT:
        prompt, answer = (tokenizer(row[part])["input_ids"] for part in ("prompt", "answer"))
        answer = [*answer, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    return total / count


def left_behind() -> dict:
    """Actors that live, but for Ray Data's own, and placement groups that hold something."""
    address = ray.get_runtime_context().gcs_address
    alive = [actor.class_name for actor in list_actors(address, filters=[("state", "!=", "DEAD")])]
    actors = [name for name in alive if not name.startswith("_")]
    groups = [group.state for group in list_placement_groups(address) if group.state != "REMOVED"]
    return {"actors": sorted(actors), "groups": groups, "CPU": ray.available_resources().get("CPU", 0)}


def wait_until(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


@pytest.fixture(scope="module")
def searched(cluster, tiny_models, tmp_path_factory):
    """Six trials that train, of which two are killed, and one that cannot be; (directory, result, before, after)."""
    out = tmp_path_factory.mktemp("searched")
    before = left_behind()
    make = factory(str(tiny_models["llama"]), out)
    result = tune.search(make, {"case": ray.tune.grid_search([*range(len(CASES)), "never"])}, progress=True)
    wait_until(lambda: left_behind()["actors"] == before["actors"], 20)
    return out, result, before, left_behind()


def test_the_right_trial_wins_though_it_was_killed(searched, tiny_models):
    out, result, _, _ = searched
    assert {trial.point["case"]: trial.state for trial in result.trials} == dict.fromkeys(range(6), "finished") | {
        "never": "refused"
    }
    assert {path.name for path in out.glob("killed-*")} == {"killed-driver", "killed-worker"}
    losses = {
        trial.point["case"]: torch_loss(str(tiny_models["llama"]), f"{trial.path}/adapter")
        for trial in result.trials
        if trial.state == "finished"
    }
    assert min(losses, key=losses.get) == result.best.point["case"] == 1
    for trial in result.trials:
        if trial.state == "finished":
            assert trial.metrics["eval_loss"] == pytest.approx(losses[trial.point["case"]], rel=1e-4)


def test_nothing_is_left_behind(searched):
    _, _, before, after = searched
    assert after == before


def write_config(job: Path, base: str) -> Path:
    """The shipped example with a tiny model and two short trials, one after the other; data beside it."""
    content, _ = read_yaml(Path(__file__).parents[2] / "examples" / "tune.yaml")
    for name, rows in (("train", ROWS), ("eval", HELD_OUT)):
        (job / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        content[f"{name}_dataloader"]["dataset"]["max_seq_len"] = LENGTH
    content["model"]["preset_handle"] = base
    content["trainer"] = {"steps": 2, "eval_steps_interval": 1}
    content["run_config"]["storage_path"] = str(job.parent / "runs")
    content["exports"][0]["output_dir"] = str(job.parent / "best")
    content["tune"] |= {"num_samples": 2, "max_concurrent_trials": 1, "searcher": "optuna", "grace_steps": 2}
    path = job / "tune.yaml"
    path.write_text(json.dumps(content))
    return path


def test_a_search_as_a_job_that_is_stopped_goes_on(cluster, tiny_models, tmp_path, monkeypatch, capfd):
    """Stopped when the second trial has reported; the first is not trained again, and the best is exported."""
    job = tmp_path / "job"
    job.mkdir()
    path = write_config(job, str(tiny_models["llama"]))
    address = f"http://{cluster.dashboard_url}"
    arguments = ["submit", str(path), "--tune", "--address", address, "--working-dir", str(job)]
    assert main([*arguments, "--python", sys.executable]) == 0
    name = re.search(r"submitted (\S+);", capfd.readouterr().out)[1]
    client = submit.connect(address)

    def reported() -> list[str]:
        return list(dict.fromkeys(re.findall(r"(?m)^(\S+) step=1 ", client.get_job_logs(name))))

    wait_until(lambda: len(reported()) == 2 or client.get_job_status(name) in submit._ENDED, 200)
    first, second = reported()
    submit.stop(client, name)
    run = tmp_path / "runs" / "search" / first / "run" / "run.json"
    before = run.read_bytes()

    monkeypatch.chdir(job)
    assert main(["tune", str(path)]) == 0
    shown = capfd.readouterr()
    assert json.loads(before)["status"] == "finished"
    assert run.read_bytes() == before
    assert first not in shown.err
    assert f"{second} step=2" in shown.err
    assert f"exported {tmp_path / 'best'}" in shown.out
    assert {place.parent.name for place in (tmp_path / "runs" / "search").glob("*/run")} == {first, second}
    found = {trial: tmp_path / "runs" / "search" / trial / "run" / "adapter" for trial in (first, second)}
    losses = {trial: torch_loss(str(tiny_models["llama"]), str(adapter)) for trial, adapter in found.items()}
    best = min(losses, key=losses.get)
    assert f"best {best} " in shown.out
    ours, theirs = (load_file(where / "adapter_model.safetensors") for where in (tmp_path / "best", found[best]))
    assert ours.keys() == theirs.keys()
    assert all((ours[tensor] == theirs[tensor]).all() for tensor in ours)
