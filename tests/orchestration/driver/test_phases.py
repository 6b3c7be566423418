"""The driver's part of a run's start, by a clock that the test turns."""

from kithara_ray.orchestration.driver import phases as module
from kithara_ray.orchestration.driver.phases import Phases
from kithara_ray.orchestration.worker.spec import Start


def test_phases_follow_each_other_and_others_go_on_beside_them(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    phases = Phases()
    phases.enter("check")
    now[0] = 101.0
    with phases.beside("tokenizer"):
        now[0] = 103.0
        phases.enter("tokenize")
        now[0] = 103.5
    now[0] = 104.0
    phases.enter("schedule")
    now[0] = 109.0
    assert phases.start() == Start(100.0, 104.0, {"check": 3.0, "tokenize": 1.0}, {"tokenizer": (1.0, 3.5)})
