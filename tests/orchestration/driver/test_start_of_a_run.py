"""The order in which a run starts, with all that would ask a cluster replaced. No Ray."""

from unittest.mock import MagicMock

import numpy as np
import optax
import pytest
from asking import loader

from kithara_ray import KerasHubModel, Trainer
from kithara_ray.errors import ConfigError
from kithara_ray.orchestration import trainer as trainers
from kithara_ray.orchestration.cluster.worker_group import WorkerGroup
from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.orchestration.driver.run_spec import Tokenized
from kithara_ray.orchestration.preflight.findings import FAILED, OK, Finding


class Ended(Exception):
    """The workers were asked for."""


@pytest.fixture
def started(tiny_models, monkeypatch):
    """Starts a run with given findings of its checks; returns what happened, and the spec that the workers got."""
    done, specs = [], []
    lengths = np.array([3, 9], np.int32)
    store = TokenStore((), lengths, lengths - 2, np.array([0, 2]), pad_id=0)

    def note(what, value=None):
        return lambda *arguments, **named: done.append(what) or value

    def run(group, loop, config, *rest):
        specs.append(config["spec"])
        raise Ended

    for name in ("start_ray", "_events_so_far"):
        monkeypatch.setattr(trainers, name, lambda *arguments: [])
    manifest = MagicMock()
    manifest.begin.side_effect = note("run.json")
    monkeypatch.setattr(trainers, "RunManifest", lambda request: manifest)
    monkeypatch.setattr(trainers, "tokenized", note("tokenize", Tokenized(store, None)))
    monkeypatch.setattr(trainers, "keep_tokenizer", note("tokenizer", {}))
    monkeypatch.setattr(trainers.ray, "get", note("coordinator is there"))
    monkeypatch.setattr(KerasHubModel, "coordinator", note("coordinator", MagicMock()))
    monkeypatch.setattr(trainers.Progress, "follow", note("follow"))
    monkeypatch.setattr(WorkerGroup, "begin", note("begin"))
    monkeypatch.setattr(WorkerGroup, "wait", note("wait"))
    monkeypatch.setattr(WorkerGroup, "run", run)

    def start(findings):
        monkeypatch.setattr(trainers, "check_run", lambda request, *rest: done.append("check") or (findings, request))
        model = KerasHubModel.from_preset(str(tiny_models["llama"]), lora_rank=4)
        Trainer(model, optax.sgd(1.0), loader(3), steps=1, gradient_accumulation_steps=2, progress=False).train()

    return start, done, specs


def test_the_coordinator_starts_when_the_checks_have_passed(started):
    start, done, specs = started
    with pytest.raises(Ended):
        start([Finding("rows", OK, "2")])
    assert done == [
        "check",
        "coordinator",
        "begin",
        "tokenize",
        "wait",
        "coordinator is there",
        "follow",
        "tokenizer",
        "run.json",
    ]
    assert (specs[0].train.rows_per_device, specs[0].steps, specs[0].plan) == (6, 1, None)


def test_after_a_failed_check_nothing_is_started(started):
    start, done, specs = started
    with pytest.raises(ConfigError, match="no"):
        start([Finding("rows", OK, "2"), Finding("devices", FAILED, "no", ConfigError("no"))])
    assert (done, specs) == (["check"], [])
