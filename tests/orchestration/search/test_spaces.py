"""Searches before they start: spaces, refusals, how many trials find room, what is reported, which search goes on."""

import copy
import dataclasses
import inspect
import itertools
import json
import math
import os
import pickle
import re
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import ray.tune
import yaml
from asking import evaluation, request
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.tune.callback import CallbackList
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher
from rich.console import Console

from kithara_ray import Checkpointer, Profiler, config, tune
from kithara_ray.errors import ConfigError, TrainingError, UnsupportedError
from kithara_ray.orchestration.request.snapshots import Snapshots
from kithara_ray.orchestration.search import search as searching
from kithara_ray.orchestration.search import spaces, trial
from kithara_ray.orchestration.search.search import TrialResult
from kithara_ray.orchestration.search.state_files import whole_files


def test_a_space_as_data_is_the_space_in_rays_own_terms():
    ways = {
        "choice": [8, 16],
        "uniform": [0.0, 1.0],
        "loguniform": [1e-5, 1e-2],
        "quniform": [0, 1, 0.25],
        "randint": [1, 9],
    }
    for way, arguments in ways.items():
        ours = spaces.domains_of({"x": {way: arguments}})["x"]
        theirs = getattr(ray.tune, way)(*([arguments] if way == "choice" else arguments))
        assert spaces.describe(ours) == spaces.describe(theirs)
        values = np.array(ours.sample(random_state=np.random.default_rng(0), size=50))
        np.testing.assert_array_equal(values, theirs.sample(random_state=np.random.default_rng(0), size=50))
        assert min(arguments[:2]) <= values.min() < values.max() <= max(arguments[:2])
    assert spaces.domains_of({"x": {"grid_search": [1, 2]}}) == {"x": ray.tune.grid_search([1, 2])}
    assert spaces.domains_of({"x": ray.tune.uniform(0, 1)})["x"].upper == 1
    different = [{"loguniform": [1e-5, 1e-2]}, {"uniform": [1e-5, 1e-2]}, {"loguniform": [1e-5, 1e-3]}]
    for one, other in itertools.combinations([spaces.domains_of({"x": way})["x"] for way in different], 2):
        assert spaces.describe(one) != spaces.describe(other)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space is empty"),
        ({"x": 3}, "space 'x': 3 does not say how a value is chosen; give one of .* choice, grid_search, uniform"),
        ({"x": [8, 16]}, r"space 'x': \[8, 16\] does not say"),
        ({"x": {"logunifrom": [1, 2]}}, "does not say how a value is chosen"),
        ({"x": {"choice": "ab"}}, "choice takes a list, got 'ab'"),
        ({"x": {"uniform": [1]}}, r"Ray Tune refuses uniform\[1\]"),
        ({"x": {"loguniform": [0, 1]}}, r"Ray Tune refuses loguniform\[0, 1\]"),
    ],
)
def test_spaces_that_are_none(space, message):
    with pytest.raises(ConfigError, match=message):
        spaces.domains_of(space)


def never(point):
    raise AssertionError("nothing is made before the arguments are checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        ({"max_failures": -1}, "max_failures must be an integer >= 0, got -1"),
        ({"max_concurrent_trials": 0}, "max_concurrent_trials must be an integer >= 1"),
        ({"mode": "lowest"}, "mode must be 'min' or 'max', got 'lowest'"),
        ({"scheduler": "sha"}, "scheduler must be \"asha\", None or one of Ray Tune's, got 'sha'"),
        ({"scheduler": "asha", "reduction_factor": 1}, "reduction_factor must be > 1, got 1"),
        ({"searcher": "grid"}, 'searcher must be "random", "optuna" or one of Ray Tune\'s, got \'grid\''),
        ({"searcher": "optuna"}, "Optuna tries no grids; give x as"),
    ],
)
def test_arguments_that_are_wrong(arguments, message):
    with pytest.raises(ConfigError, match=message):
        searching.search(never, {"x": {"grid_search": [1, 2]}}, **arguments)


@pytest.mark.parametrize(
    "scheduler",
    [
        "pbt",
        "hyperband",
        PopulationBasedTraining(hyperparam_mutations={"x": [1]}),
        HyperBandScheduler(),
        MedianStoppingRule(hard_stop=False),
    ],
)
def test_schedulers_that_change_or_pause_trials_are_refused_by_name(scheduler):
    name = scheduler if isinstance(scheduler, str) else type(scheduler).__name__
    with pytest.raises(UnsupportedError, match=f"scheduler='?{name}'?: it pauses trials or changes their settings"):
        searching.search(never, {"x": {"choice": [1]}}, scheduler=scheduler)


def test_schedulers_that_stop_trials_are_taken():
    for scheduler in (None, "asha", ASHAScheduler(), MedianStoppingRule()):
        spaces.check_scheduler(scheduler, 4)
    asha = spaces.scheduler_of("asha", 12, 3)
    assert (asha._time_attr, asha._brackets[0]._rungs[-1][0], asha._brackets[0].rf) == ("step", 12, 3)


class Tried:
    """What a scheduler looks at of a trial."""

    def __init__(self, trial_id, status=Trial.RUNNING):
        self.trial_id, self.status = trial_id, status


def test_asha_goes_on_with_what_it_had_seen_when_the_search_was_ended(tmp_path):
    good, bad = Tried("good"), Tried("bad")

    def search():
        asha = spaces.scheduler_of("asha", 2, 4)
        asha.set_search_properties("loss", "min")
        for each in (good, bad):
            asha.on_trial_add(None, each)
        return asha, CallbackList([searching._Shown("loss", asha, False, Console(quiet=True))])

    (first, kept), (fresh, _), (again, restored) = search(), search(), search()
    assert first.on_trial_result(None, good, {"step": 2, "loss": 1.0}) == TrialScheduler.CONTINUE
    kept.save_to_dir(str(tmp_path))
    restored.restore_from_dir(str(tmp_path))
    seen = {"step": 2, "loss": 2.0}
    assert [asha.on_trial_result(None, bad, seen) for asha in (fresh, again)] == ["CONTINUE", "STOP"]
    # Of a trial that goes on it has decided.
    assert again.on_trial_result(None, good, {"step": 2, "loss": 3.0}) == TrialScheduler.CONTINUE


def test_the_median_rule_pauses_no_trial_for_one_that_waits():
    controller = MagicMock()
    controller.get_live_trials.return_value = [Tried("waits", Trial.PENDING)]
    actions = []
    for rule in (MedianStoppingRule(grace_period=1), spaces.scheduler_of(MedianStoppingRule(grace_period=1), 1, 4)):
        rule.set_search_properties("loss", "min")
        actions.append(rule.on_trial_result(controller, Tried("runs"), {"time_total_s": 2, "loss": 1.0}))
    assert actions == ["PAUSE", "CONTINUE"]


class Told(Searcher):
    """A searcher that keeps what it is told."""

    def __init__(self):
        super().__init__("loss", "min")
        self.results = []

    def suggest(self, trial_id):
        return {"x": 1}

    def on_trial_result(self, trial_id, result):
        self.results.append((trial_id, result["loss"]))

    def on_trial_complete(self, trial_id, result=None, error=False):
        self.results.append((trial_id, "failed" if error else "complete"))


def test_a_searcher_is_not_told_of_a_trial_that_is_tried_again_after_it_failed():
    chosen = spaces.points(told := Told(), at_once=2, seed=0).searcher
    chosen.suggest("a")
    chosen.on_trial_result("a", {"loss": 3.0})
    chosen.on_trial_complete("a", error=True)
    chosen.on_trial_result("a", {"loss": 2.0})
    chosen.on_trial_complete("a", {"loss": 1.0})
    assert told.results == [("a", 3.0), ("a", "failed")]


def test_the_state_of_a_search_is_whole_at_any_moment(tmp_path):
    files, state = whole_files(), tmp_path / "experiment_state-1.json"
    state.write_text("before")
    with files.open_output_stream(str(state)) as stream:
        stream.write(b"after, and lo")
        stream.flush()
        assert state.read_text() == "before"
        stream.write(b"nger")
    assert state.read_text() == "after, and longer"
    assert [path.name for path in tmp_path.iterdir()] == [state.name]
    with pickle.loads(pickle.dumps(files)).open_input_stream(str(state)) as stream:
        assert stream.readall() == state.read_bytes()


def test_a_search_whose_state_cannot_be_read_does_not_begin_anew():
    shown = searching._Shown("loss", None, True, Console(quiet=True))
    with pytest.raises(ConfigError, match="cannot be read, so the search cannot go on; give another run_config name"):
        shown.on_step_begin(0, [])
    fresh = searching._Shown("loss", None, False, Console(quiet=True))
    fresh.on_step_begin(0, [])


def test_optuna_is_asked_for_when_it_is_not_there(monkeypatch):
    monkeypatch.setattr(spaces.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r'needs Optuna: pip install "kithara-ray\[tune\]"'):
        spaces.check_searcher("optuna", {})


def test_a_resumed_search_takes_the_clusters_concurrency_and_goes_on_with_its_points(tmp_path):
    def fresh(at_once):
        chosen = spaces.points("random", at_once, seed=3)
        wanted = {"config": {"x": ray.tune.uniform(0, 1)}, "num_samples": 5, "storage_path": str(tmp_path)}
        return chosen, ray.tune.Experiment("e", run=lambda point: None, **wanted)

    first, experiment = fresh(4)
    first.add_configurations([experiment])
    seen = [first.next_trial().config["x"] for _ in range(4)]
    assert first.next_trial() is None
    state = first.get_state()
    again, _ = fresh(1)
    again.set_state(state | {"_live_trials": set()})
    rest = again.next_trial().config["x"]
    assert rest not in seen
    assert again.max_concurrent == 1
    whole, experiment = fresh(9)
    whole.add_configurations([experiment])
    assert [whole.next_trial().config["x"] for _ in range(5)] == [*seen, rest]


def test_as_many_trials_at_once_as_find_workers():
    nodes = [{"CPU": 4.0}, {"CPU": 3.0, "node:a": 1.0}]
    for workers, cpus, trials in ((1, 1, 7), (2, 1, 3), (1, 2, 3), (3, 2, 1), (2, 4, 0)):
        asks = ScalingConfig(num_workers=workers, resources_per_worker={"CPU": cpus})
        assert searching.room_for(asks, nodes) == trials, (workers, cpus)
    hosts = [{"CPU": 8.0, "TPU": 4.0, "accelerator_type:TPU-V5LITEPOD": 1.0} for _ in range(8)]
    for head in hosts[::4]:
        head["TPU-v5litepod-16-head"] = 1.0
    tpu = dict(use_tpu=True, topology="4x4", accelerator_type="TPU-V5LITEPOD")
    assert searching.room_for(ScalingConfig(num_workers=4, **tpu), hosts) == 2
    assert searching.room_for(ScalingConfig(num_workers=8, **tpu), hosts) == 1
    # One slice is taken.
    assert searching.room_for(ScalingConfig(num_workers=4, **tpu), hosts[:4]) == 1


def test_the_metric_is_reported_when_it_is_new_and_the_end_is_not():
    """The end of a run is reported when its adapter is written."""
    step = lambda n, **more: {"kind": "step", "step": n, "loss": n + 0.5, **more}  # noqa: E731
    events = [{"kind": "started", "total_steps": 3}, step(1), {"kind": "eval", "step": 1, "eval_loss": 9.0}, step(2)]
    events += [{"kind": "eval", "step": 2, "eval_loss": 8.0}, step(3), {"kind": "eval", "step": 3, "eval_loss": 7.0}]
    by_eval = trial.Reports("eval_loss")
    reported = [*by_eval.of(events[:3]), *by_eval.of(events[3:])]
    assert reported == [{"step": 1, "loss": 1.5, "eval_loss": 9.0}, {"step": 2, "loss": 2.5, "eval_loss": 8.0}]
    assert [report["loss"] for report in trial.Reports("loss").of(events)] == [1.5, 2.5]


def ended(number, state, value):
    return TrialResult(
        f"{number}", {"x": number}, state, {"loss": value}, "/p", error="why" if state == "refused" else None
    )


def test_the_best_is_one_that_finished():
    trials = [ended(0, "stopped", 0.1), ended(1, "finished", 3.0), ended(2, "finished", 2.0)]
    trials += [ended(3, "refused", math.inf), ended(4, "finished", math.nan)]
    assert searching.best_of(trials, "loss", "min").id == "2"
    assert searching.best_of(trials, "loss", "max").id == "1"
    with pytest.raises(TrainingError, match=r"none of 2 trials has finished; 3 \{'x': 3\}: why"):
        searching.best_of([trials[0], trials[3]], "loss", "min")


def test_a_directory_that_holds_another_search_is_refused_by_what_differs(tmp_path):
    about = {"space": {"x": spaces.describe(ray.tune.uniform(0, 1))}, "num_samples": 3}
    directory = str(tmp_path / "search")
    assert not searching._begin(directory, about, {"model": "m"})
    assert not searching._begin(directory, about, {"model": "m"})  # ended before its first trial
    (tmp_path / "search" / "experiment_state-now.json").touch()
    assert searching._begin(directory, about, {"model": "m"})
    with pytest.raises(ConfigError, match="holds a search with another num_samples: it was 3 and is 4"):
        searching._begin(directory, about | {"num_samples": 4}, {"model": "m"})
    with pytest.raises(ConfigError, match="holds a search with another config"):
        searching._begin(directory, about, {"model": "n"})


@pytest.fixture
def loaded(tmp_path, tiny_models):
    """A small configuration with a search."""

    def load(space, **more):
        dataset = {"type": "SFTDataset", "source": [{"prompt": "a", "answer": "b"}]}
        content = {
            "model": {"preset_handle": str(tiny_models["llama"])},
            "train_dataloader": {"dataset": dataset, "per_device_batch_size": 1},
            "optimizer": {"learning_rate": 1e-3},
            "trainer": {"steps": 4},
            "exports": [{"output_dir": "/x"}],
            "tune": {"space": space, **more},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return config.load(path)

    return load


def test_a_point_is_put_into_the_configuration(loaded):
    space = {
        "optimizer.learning_rate": {"loguniform": [1e-5, 1e-2]},
        "model.lora_rank": {"randint": [2, 9]},
        "trainer.mesh.fsdp": {"choice": [1, -1]},
    }
    made = tune.ConfigFactory(loaded(space), space)
    point = spaces.plain(
        {"optimizer.learning_rate": np.float64(2e-3), "model.lora_rank": np.int64(7), "trainer.mesh.fsdp": 1}
    )
    trainer = made(point)
    asked = trainer.request
    assert asked.step.optimizer[1]["config"]["learning_rate"] == pytest.approx(2e-3)
    assert (trainer.model.lora.r, asked.model.lora.r, asked.step.mesh.fsdp, asked.steps) == (7, 7, 1, 4)
    # What its run.json repeats is the trial alone.
    assert asked.config["model"]["lora_rank"] == 7
    assert not {"tune", "exports"} & set(asked.config)
    assert made({"model.lora_rank": 3}).model.lora.r == 3


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optimizer.learning_rat": {"choice": [1e-3]}}, "learning_rat: no such key; did you mean 'learning_rate'"),
        ({"model.lora_rank": {"uniform": [2, 9]}}, r"model\.lora_rank: should be a valid integer"),
        ({"scaling_config.num_workers": {"choice": [1]}}, "cannot be searched: all trials have the same workers"),
        ({"trainer.checkpointer": {"choice": [1]}}, "each trial has checkpoints of its own"),
        ({"exports.0.dtype": {"choice": ["auto"]}}, "they are made from the best trial"),
        ({"optimizer.learning_rate.x": {"choice": [1]}}, "learning_rate is a value and has no keys"),
    ],
)
def test_keys_that_cannot_be_searched(loaded, space, message, monkeypatch):
    monkeypatch.setattr(searching, "start_ray", lambda: None)
    with pytest.raises(ConfigError, match=message):
        tune.search(loaded(space, metric="loss"))


def test_what_a_search_of_a_configuration_needs(loaded, monkeypatch):
    monkeypatch.setattr(searching, "start_ray", lambda: None)
    rank = {"model.lora_rank": {"choice": [2]}}
    with pytest.raises(ConfigError, match=r"metric='eval_loss' needs Trainer\(eval_dataloader"):
        tune.search(loaded(rank))
    with pytest.raises(ConfigError, match=r"tune\.num_sample: no such key; did you mean 'num_samples'"):
        loaded(rank, num_sample=2)
    with pytest.raises(ConfigError, match="a search needs a space"):
        tune.search(loaded(rank).model_copy(update={"tune": None}))


def test_the_page_shows_what_works(tiny_models, tmp_path, monkeypatch):
    """Its script up to the search itself, on a tiny model; its YAML is the shipped example's."""
    root = Path(__file__).parents[3]
    text = (root / "docs" / "tune.md").read_text()
    script, section = (re.search(rf"(?s)```{language}\n(.*?)```", text)[1] for language in ("python", "yaml"))
    shipped = yaml.safe_load((root / "examples" / "tune.yaml").read_text())["tune"]
    assert yaml.safe_load(section)["tune"].items() <= shipped.items()
    monkeypatch.chdir(tmp_path)
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "a", "answer": "b"}))
    called = {}
    monkeypatch.setattr(tune, "search", lambda *given, **named: called.update(given=given, named=named) or MagicMock())
    base = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base in script
    names = {}
    exec(script.replace(base, str(tiny_models["llama"])), names)
    inspect.signature(searching.search).bind(*called["given"], **called["named"])
    trainer = names["make"]({"rank": 4, "learning_rate": 1e-3})
    assert (trainer.model.lora.r, trainer.request.group.run_config.name) == (4, "search")
    assert spaces.domains_of(called["given"][1]).keys() == {"rank", "learning_rate"}


def test_a_trial_writes_below_its_own_directory():
    """The request that it is made of stays as it was."""
    asked = request(
        run_config=RunConfig(name="search", storage_path="/runs", failure_config=FailureConfig(max_failures=3)),
        evaluation=evaluation(),
        snapshots=Snapshots(2, "/elsewhere"),
        reporting={"tensorboard_dir": "gs://b/boards", "profiler": Profiler("/profiles", (1, 2))},
    )
    before = copy.deepcopy(vars(asked.group.run_config)), asked.reporting, asked.snapshots, asked.group
    placed = trial.placed(asked, "/runs/search/t1/run", "eval_loss", "max")
    assert (copy.deepcopy(vars(asked.group.run_config)), asked.reporting, asked.snapshots, asked.group) == before
    assert asked.checkpointer is None
    assert (placed.directory, placed.group.storage) == ("/runs/search/t1/run", "/runs/search/t1")
    assert placed.group.run_config.failure_config.max_failures == 3
    assert placed.checkpointer.checkpoint_dir == "/runs/search/t1/run/checkpoints"
    assert (placed.checkpointer.score_attribute, placed.checkpointer.score_order) == ("eval_loss", "max")
    assert placed.snapshots == Snapshots(2, "/runs/search/t1/run/adapters")
    reporting = placed.reporting
    assert (reporting.tensorboard_dir, reporting.profiler) == ("gs://b/boards/t1", Profiler("/profiles/t1", (1, 2)))
    assert (reporting.progress, asked.reporting.progress) == (False, True)
    # It waits for its turn as long as that takes.
    assert placed.group.cluster_timeout_s > 10**6
    kept = ("model", "train", "evaluation", "steps", "epochs", "step", "timeouts", "config")
    assert all(getattr(placed, name) is getattr(asked, name) for name in kept)


def test_a_trial_keeps_its_checkpointers_settings():
    given = Checkpointer("/mine", save_interval_steps=7, save_timeout_s=11)
    placed = trial.placed(request(checkpointer=given), "gs://b/search/t1/run", "loss", "min")
    assert placed.checkpointer == dataclasses.replace(given, checkpoint_dir="gs://b/search/t1/run/checkpoints")
    assert given.checkpoint_dir == "/mine"
    assert placed.snapshots is placed.reporting.profiler is placed.reporting.tensorboard_dir is None
    default = trial.placed(request(), "/runs/search/t1/run", "loss", "min").checkpointer
    assert (default.score_attribute, default.max_to_keep) == (None, 2)


def test_a_trials_trainer_is_placed_and_knows_no_other_process_actors(loaded, tmp_path):
    make = tune.ConfigFactory(loaded({}), {})
    trainer = make({"model.lora_rank": 2})
    trainer.model._coordinator = "the script's"
    workers = trial.workers_of(trainer.request.group.scaling_config)
    settings = trial.TrialSettings(b"", str(tmp_path), "loss", "min", workers, os.getcwd())
    trial.TrialDriver(settings)._placed(trainer, f"{tmp_path}/t1/run")
    assert trainer.request.directory == f"{tmp_path}/t1/run"
    assert trainer.model._coordinator is None
    other = dataclasses.replace(settings, workers=(9, *workers[1:]))
    with pytest.raises(ConfigError, match="this trial asks for workers that differ from the search's"):
        trial.TrialDriver(other)._placed(trainer, f"{tmp_path}/t1/run")
