"""The speed that is logged."""

from types import SimpleNamespace

import numpy as np

from kithara_ray.orchestration.worker import throughput


def test_the_load_of_experts_is_a_number_for_each_block():
    metrics = {"loss": np.float32(1.5), "expert_load": np.array([1.25, 4.0], np.float32)}
    numbers = throughput.numbers_of(metrics, [0, 12])
    assert numbers == {"loss": 1.5, "expert_load": 4.0, "expert_load/00": 1.25, "expert_load/12": 4.0}
    assert throughput.numbers_of({"loss": np.float32(2)}, []) == {"loss": 2.0}


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
