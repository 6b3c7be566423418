"""The speed that is logged."""

from types import SimpleNamespace

from kithara_ray.orchestration.worker import throughput


def test_what_is_done_between_steps_is_not_their_time(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(throughput.time, "monotonic", lambda: clock.now)
    window = throughput.Window(4)
    window.add(100)
    clock.now += 2
    with window.paused():
        clock.now += 50
    window.add(60)
    with window.waiting():
        clock.now += 1
    clock.now += 1
    assert window.close(6) == {"tokens_per_s": 40, "step_time_s": 2, "input_wait_s": 0.5}
    window.add(10)
    clock.now += 5
    assert window.close(7) == {"tokens_per_s": 2, "step_time_s": 5, "input_wait_s": 0}
    assert window.total_input_wait_s == 1
