"""Searches on a local cluster: the right trial wins, whatever dies on the way, and nothing is left behind."""

import contextlib
import gc
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import keras
import optuna
import pytest
import ray
import tiny
import torch
from loops import loop_with, use
from peft import PeftModel
from ray.train import RunConfig, ScalingConfig
from ray.util.state import list_actors, list_placement_groups
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from kithara_ray import Dataloader, KerasHubModel, SFTDataset, Trainer
from kithara_ray.cli.app import main
from kithara_ray.errors import ConfigError
from kithara_ray.orchestration import trainer
from kithara_ray.orchestration.search import search
from kithara_ray.yaml_file import read_yaml

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS, GRACE, LENGTH = 3, 2, 64
ROWS, HELD_OUT = tiny.rows(12), tiny.rows(7)
# A learning rate, and what becomes of the trial: its worker is killed, once; it does not end by itself.
CASES = [(0.0, None), (3e-2, "killed"), (30.0, "endless")]
BEST, ENDLESS = 1, 2
AT_ONCE = 2


def loop_of(fate: str | None, done: Path):
    """The workers' own loop, which writes to `done` each step that it has made.

    Args:
        fate: "killed": the process dies by SIGKILL when it is at step GRACE, once.
            "endless": the step after GRACE never ends.
    """

    def watch(run):
        made = done.read_text() if done.exists() else ""
        if run.number == GRACE and fate == "killed" and "killed" not in made:
            run.saving.saver.wait()
            done.write_text(f"{made}killed ")
            os.kill(os.getpid(), signal.SIGKILL)
        if run.number > GRACE and fate == "endless":
            threading.Event().wait(300)
        done.write_text(f"{made}{run.number} ")

    return loop_with(before_step=watch)


def factory(base: str, out: Path):
    def make(point: dict) -> Trainer:
        if point["case"] == "never":
            raise ConfigError("this point cannot be trained")
        learning_rate, fate = CASES[point["case"]]
        use(loop_of(fate, out / f"steps-{point['case']}"))
        model = KerasHubModel.from_preset(base, lora_rank=4, precision="float32")
        rows = SFTDataset(ROWS, tokenizer_handle=base, max_seq_len=LENGTH)
        held_out = SFTDataset(HELD_OUT, tokenizer_handle=base, max_seq_len=LENGTH)
        return Trainer(
            model=model,
            optimizer=keras.optimizers.AdamW(learning_rate, weight_decay=0.0),
            train_dataloader=Dataloader(rows, per_device_batch_size=4, length_buckets=1),
            eval_dataloader=Dataloader(held_out, per_device_batch_size=4, length_buckets=1),
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
    """Three trials that train, of which one is killed and one never ends, and one that cannot be.

    Yields (directory, result, what was there before, and after).
    """
    out = tmp_path_factory.mktemp("searched")
    # Errors that tests before this have seen hold coordinators, in cycles; and their jobs may not have ended yet.
    gc.collect()
    wait_until(lambda: {"JobSupervisor", "Coordinator"}.isdisjoint(left_behind()["actors"]), 60)
    before = left_behind()
    make = factory(str(tiny_models["llama"]), out)
    space = {"case": ray.tune.grid_search([*range(len(CASES)), "never"])}
    with pytest.MonkeyPatch.context() as patch:
        # The search calls the factory in this process too.
        patch.setattr(trainer, "TRAIN_LOOP", trainer.TRAIN_LOOP)
        result = search.search(make, space, scheduler="asha", grace_steps=GRACE, max_concurrent_trials=AT_ONCE)
    wait_until(lambda: left_behind()["actors"] == before["actors"], 20)
    return out, result, before, left_behind()


@pytest.mark.long
def test_the_right_trial_wins_though_it_was_killed(searched, tiny_models):
    out, result, _, _ = searched
    trials = {trial.point["case"]: trial for trial in result.trials}
    assert trials.keys() == {*range(len(CASES)), "never"}
    assert trials["never"].state == "refused"
    # It went on from its checkpoint.
    assert (out / f"steps-{BEST}").read_text() == "1 killed 2 3 "
    finished = {case: trial for case, trial in trials.items() if trial.state == "finished"}
    losses = {case: torch_loss(str(tiny_models["llama"]), f"{trial.path}/adapter") for case, trial in finished.items()}
    assert len(losses) > 1
    assert min(losses, key=losses.get) == result.best.point["case"] == BEST
    for case, trial in finished.items():
        assert trial.metrics["eval_loss"] == pytest.approx(losses[case], rel=1e-4)


@pytest.mark.long
def test_a_bad_trial_is_stopped_early_and_its_checkpoint_stays(searched, tiny_models, tmp_path):
    """The worst would never have ended by itself."""
    out, result, _, _ = searched
    stopped = {trial.point["case"]: trial for trial in result.trials if trial.state == "stopped"}
    assert {trial.metrics["step"] for trial in stopped.values()} == {GRACE}
    assert (out / f"steps-{ENDLESS}").read_text() == "1 2 "
    arguments = ["--step", str(GRACE), "--format", "adapter", "--to", str(tmp_path / "adapter")]
    assert main(["export", stopped[ENDLESS].path, *arguments]) == 0
    loss = torch_loss(str(tiny_models["llama"]), str(tmp_path / "adapter"))
    assert stopped[ENDLESS].metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert loss > result.best.metrics["eval_loss"]


@pytest.mark.long
def test_nothing_is_left_behind(searched):
    _, _, before, after = searched
    assert after == before


def write_config(job: Path, base: str) -> Path:
    """The shipped example with a tiny model and three short trials, two at once, chosen by Optuna; data beside it."""
    content, _ = read_yaml(Path(__file__).parents[3] / "examples" / "tune.yaml")
    for name, rows in (("train", ROWS), ("eval", HELD_OUT)):
        (job / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        content[f"{name}_dataloader"]["dataset"]["max_seq_len"] = LENGTH
        content[f"{name}_dataloader"]["length_buckets"] = 1
    content["model"]["preset_handle"] = base
    content["trainer"] = {"steps": 2, "eval_steps_interval": 1}
    content["run_config"]["storage_path"] = str(job.parent / "runs")
    content["exports"][0]["output_dir"] = str(job.parent / "best")
    content["tune"] |= {"num_samples": 3, "max_concurrent_trials": 2, "searcher": "optuna", "max_failures": 0}
    path = job / "tune.yaml"
    path.write_text(json.dumps(content))
    return path


class Search:
    """What Ray Tune has kept of a search."""

    def __init__(self, directory: Path):
        self._directory = directory

    def states(self) -> dict[str, str]:
        """By trial: PENDING, RUNNING, ERROR or TERMINATED."""
        kept = max(self._directory.glob("experiment_state-*.json"), default=None)
        trials = json.loads(kept.read_text())["trial_data"] if kept else []
        return {trial["trial_id"]: trial["status"] for trial in (json.loads(data) for data, _ in trials)}

    def points(self) -> dict[str, dict]:
        """By trial, of its run's configuration."""
        configs = {
            path.parent.parent.name: json.loads(path.read_text())["config"]
            for path in self._directory.glob("*/run/run.json")
        }
        return {
            trial: {
                "optimizer.learning_rate": config["optimizer"]["learning_rate"],
                "model.lora_rank": config["model"]["lora_rank"],
            }
            for trial, config in configs.items()
        }


def optuna_points(count: int) -> list[dict]:
    """Of the example's space, by Optuna itself."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    space = {
        "optimizer.learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True),
        "model.lora_rank": optuna.distributions.CategoricalDistribution([4, 8, 16]),
    }
    return [study.ask(fixed_distributions=space).params for _ in range(count)]


class Drivers:
    """The processes that drive trials, in the order in which they appear on the cluster."""

    def __init__(self):
        self._address = ray.get_runtime_context().gcs_address
        self._known: list[int] = []
        self._before = set(self._alive())

    def _alive(self) -> list[int]:
        filters = [("class_name", "=", "TrialDriver"), ("state", "=", "ALIVE")]
        return [actor.pid for actor in list_actors(self._address, filters=filters)]

    def wait_for(self, number: int) -> int:
        """The pid of the one that came as so many-th."""

        def here() -> bool:
            self._known += [pid for pid in self._alive() if pid not in (*self._known, *self._before)]
            return len(self._known) >= number

        wait_until(here, 100)
        return self._known[number - 1]


@pytest.mark.long
def test_a_search_as_a_job_that_is_stopped_goes_on(cluster, tiny_models, tmp_path, monkeypatch, capfd):
    """Stopped with one trial failed, one finished and one under way: the same command trains the two that have not
    finished, and exports the best of all."""
    job = tmp_path / "job"
    job.mkdir()
    path = write_config(job, str(tiny_models["llama"]))
    search, drivers = Search(tmp_path / "runs" / "search"), Drivers()
    address = f"http://{cluster.dashboard_url}"
    arguments = ["submit", str(path), "--tune", "--address", address, "--working-dir", str(job)]
    assert main([*arguments, "--python", sys.executable]) == 0
    name = re.search(r"submitted (\S+);", capfd.readouterr().out)[1]
    os.kill(drivers.wait_for(1), signal.SIGKILL)
    frozen = drivers.wait_for(3)  # of the third trial, whose turn came when the first had failed
    os.kill(frozen, signal.SIGSTOP)
    wait_until(lambda: sorted(search.states().values()) == ["ERROR", "RUNNING", "TERMINATED"], 100)
    assert main(["submit", "--address", address, "--stop", name]) == 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(frozen, signal.SIGCONT)
    by_state = {state: trial for trial, state in search.states().items()}
    assert by_state.keys() == {"ERROR", "RUNNING", "TERMINATED"}
    finished = by_state["TERMINATED"]
    run = tmp_path / "runs" / "search" / finished / "run" / "run.json"
    before = run.read_bytes()
    assert json.loads(before)["status"] == "finished"

    monkeypatch.chdir(job)
    capfd.readouterr()
    assert main(["tune", str(path)]) == 0
    shown = capfd.readouterr()
    assert run.read_bytes() == before
    assert finished not in shown.err
    for other in (by_state["ERROR"], by_state["RUNNING"]):
        assert f"{other} step=2" in shown.err
    points = search.points()
    assert points.keys() == set(by_state.values())
    assert sorted(points.values(), key=str) == sorted(optuna_points(3), key=str)

    found = {trial: tmp_path / "runs" / "search" / trial / "run" / "adapter" for trial in points}
    losses = {trial: torch_loss(str(tiny_models["llama"]), str(adapter)) for trial, adapter in found.items()}
    best = min(losses, key=losses.get)
    assert f"best {best} " in shown.out
    assert f"exported {tmp_path / 'best'}" in shown.out
    ours, theirs = (load_file(where / "adapter_model.safetensors") for where in (tmp_path / "best", found[best]))
    assert ours.keys() == theirs.keys()
    assert all((ours[tensor] == theirs[tensor]).all() for tensor in ours)
