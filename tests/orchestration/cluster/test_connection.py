"""Ray Train's settings for a cluster of this process's own; a cluster that was there keeps Ray's."""

import os

import pytest

from kithara_ray.orchestration.cluster import connection

NAMES = ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S")


@pytest.mark.parametrize(
    ("started", "given", "expected"), [(True, None, ["0", "0.5"]), (False, None, [None, None]), (True, "1", ["1", "1"])]
)
def test_settings_are_for_the_cluster_that_this_process_starts(started, given, expected, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in NAMES:
        monkeypatch.setenv(name, "1")  # so that it is restored
        if not given:
            monkeypatch.delenv(name)
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection.ray, "init", lambda **_: None)
    monkeypatch.setattr(connection.ray_compat, "has_started_cluster", lambda: started)
    connection.start_ray()
    assert [os.environ.get(name) for name in NAMES] == expected
