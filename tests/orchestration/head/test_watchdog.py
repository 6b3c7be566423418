"""Who is named when a run makes no progress: judged without processes."""

import pytest

from kithara_ray.orchestration.head.watchdog import Watch
from kithara_ray.orchestration.worker.heartbeat import Beat, Limits

LIMITS = Limits(step_timeout_s=30, startup_timeout_s=300, save_timeout_s=100, silence_timeout_s=60)


def watch(*beats, limits=LIMITS):
    """Beats as (rank, phase, step, since_s, age_s); judged at second 1000."""
    made = Watch(limits)
    for rank, phase, step, since_s, age_s in beats:
        made.hear(Beat(rank, f"host{rank}", f"node{rank}", 100 + rank, phase, step, since_s), 1000.0 - age_s)
    return made


SILENT = "rank 1 on host1 (process 101) has given no sign of life for"
STUCK = "(process 10{}) has made no progress for {} s; it is in {}"
CASES = [
    ([(0, "step", 7, 1, 0), (1, "step", 7, 29, 0)], None),
    ([(0, "compile", 0, 290, 0), (1, "compile", 0, 299, 0)], None),
    ([(0, "save", 9, 120, 0), (1, "step", 9, 1, 0)], None),
    # Frozen, which its peers notice first; and frozen without a step that waits for it.
    ([(0, "step", 7, 31, 0), (1, "step", 7, 1, 30)], f"{SILENT} 30 s; it was in step 7; rank 0 in step 7"),
    ([(0, "step", 7, 1, 0), (1, "data", 7, 1, 61)], f"{SILENT} 61 s; it was in data of step 7"),
    # The one that is behind; of equals, the one that does not wait in a step.
    ([(0, "step", 7, 31, 0), (1, "data", 8, 40, 0)], STUCK.format(0, 31, "step 7; rank 1 in data of step 8")),
    ([(0, "step", 8, 31, 0), (1, "data", 8, 40, 0)], STUCK.format(1, 40, "data of step 8; rank 0 in step 8")),
    ([(0, "step", 8, 31, 0), (1, "eval", 8, 33, 0)], STUCK.format(1, 33, "eval of step 8")),
    ([(0, "compile", 0, 301, 0), (1, "compile", 0, 20, 0)], STUCK.format(0, 301, "compile")),
    ([(0, "end", 9, 0, 500), (1, "end", 9, 0, 500)], None),
    ([], None),
]


@pytest.mark.parametrize(("beats", "expected"), CASES)
def test_who_is_named(beats, expected):
    verdict = watch(*beats).verdict(1000.0)
    assert (verdict is None) if expected is None else (expected in verdict)


def test_none_waits_for_ever_but_not_for_the_silent():
    limits = Limits(None, 300, 100, 60)
    assert watch((0, "step", 7, 1e6, 0), limits=limits).verdict(1000.0) is None
    assert "no sign of life" in watch((0, "step", 7, 1e6, 61), limits=limits).verdict(1000.0)


def test_the_next_attempt_begins_with_an_empty_table():
    made = watch((0, "step", 7, 31, 0), (1, "step", 7, 31, 0))
    assert sorted(made.condemn()) == [("node0", 100), ("node1", 101)]
    made.hear(Beat(0, "host0", "node0", 100, "step", 7, 40), 1001.0)
    assert made.verdict(1002.0) is None
    made.hear(Beat(0, "host0", "node0", 200, "fetch", 0, 1), 1010.0)
    made.hear(Beat(1, "host1", "node1", 201, "fetch", 0, 1), 1010.0)
    made.hear(Beat(1, "host1", "node1", 301, "fetch", 0, 1), 1020.0)
    assert list(made.beats) == [1]
