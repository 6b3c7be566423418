"""Searches on a local cluster: the right trial wins, whatever dies on the way, and nothing is left behind."""

import os
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
from transformers import AutoModelForCausalLM

from kithara_ray import Dataloader, KerasHubModel, SFTDataset, Trainer
from kithara_ray.errors import ConfigError
from kithara_ray.orchestration import tune

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
