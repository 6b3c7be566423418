"""What a user may say about checkpoints, and what Ray's configurations ask for."""

import pytest
from ray.train import CheckpointConfig, FailureConfig, RunConfig

from kithara_ray import Checkpointer
from kithara_ray.errors import ConfigError
from kithara_ray.orchestration.request.arguments import checkpointer_of

BAD = {
    "interval": (dict(save_interval_steps=0), "save_interval_steps must be an integer >= 1, got 0"),
    "keep": (dict(max_to_keep=-1), "max_to_keep must be an integer >= 1, got -1"),
    "order": (dict(score_order="least"), "score_order must be 'min' or 'max', got 'least'"),
    "patience": (dict(early_stopping_patience=2), "early_stopping_patience needs score_attribute"),
    "changes": (dict(allow_changes=("sed",)), r"allow_changes must be a tuple of names out of base, .*got \('sed',\)"),
    "one change": (dict(allow_changes="seed"), "got 'seed'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    arguments, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        Checkpointer("somewhere", **arguments)


def test_paths_are_absolute_and_urls_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Checkpointer("here/").checkpoint_dir == str(tmp_path / "here")
    assert Checkpointer("gs://bucket/run/").checkpoint_dir == "gs://bucket/run"


def test_what_rays_configurations_ask_for():
    common = dict(name="run", storage_path="gs://bucket/runs")
    assert checkpointer_of(None, RunConfig(**common), evaluates=False) is None
    asked = CheckpointConfig(num_to_keep=3, checkpoint_score_attribute="eval_loss", checkpoint_score_order="min")
    taken = checkpointer_of(None, RunConfig(checkpoint_config=asked, **common), evaluates=True)
    assert taken == Checkpointer("gs://bucket/runs/run/checkpoints", max_to_keep=3, score_attribute="eval_loss")
    taken = checkpointer_of(None, RunConfig(failure_config=FailureConfig(max_failures=2), **common), evaluates=False)
    assert taken.checkpoint_dir == "gs://bucket/runs/run/checkpoints"
    assert checkpointer_of(Checkpointer("/a"), RunConfig(**common), evaluates=False) == Checkpointer("/a")
    with pytest.raises(ConfigError, match="with checkpointer=: the Checkpointer decides what is kept"):
        checkpointer_of(Checkpointer("/a"), RunConfig(checkpoint_config=asked, **common), evaluates=True)
    with pytest.raises(ConfigError, match=r"score_attribute='eval_loss' needs Trainer\(eval_dataloader"):
        checkpointer_of(Checkpointer("/a", score_attribute="eval_loss"), RunConfig(**common), evaluates=False)
