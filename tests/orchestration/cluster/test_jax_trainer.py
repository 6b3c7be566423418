"""What a failed run is said to have failed with."""

import pytest
from jax.errors import JaxRuntimeError
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

from kithara_ray.errors import DataError, TrainingError
from kithara_ray.orchestration.cluster import jax_trainer
from kithara_ray.orchestration.cluster.jax_trainer import named
from kithara_ray.orchestration.worker.event_log import one_history


def raised(error):
    return UserExceptionWithTraceback(error, traceback_str="")


LOST = JaxRuntimeError("Gloo: connection closed by peer")
DIED = RayActorError(error_msg="the actor died")


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ({0: raised(LOST), 1: raised(DataError("row 3"))}, "^row 3$"),
        ({0: raised(LOST), 1: raised(ValueError("mine"))}, "^rank 1 of the worker group failed: ValueError: mine"),
        ({0: raised(LOST), 1: DIED}, "^rank 1 of the worker group failed: RayActorError: the actor died"),
        ({0: DIED, 1: raised(ValueError("mine"))}, "^rank 1 of the worker group failed: ValueError"),
        ({0: raised(LOST), 1: raised(LOST)}, "^rank 0 of the worker group failed: JaxRuntimeError: Gloo"),
    ],
)
def test_the_rank_that_failed_by_itself_is_named(failures, expected):
    error = named(WorkerGroupError("", failures))
    with pytest.raises(type(error), match=expected):
        raise error
    stalled = named(WorkerGroupError("", failures), "rank 7 on host is stuck")
    assert isinstance(stalled, TrainingError)
    assert "rank 7" in str(stalled)


def test_what_a_dead_controller_held_is_freed(monkeypatch):
    class Trainer:
        def fit(self):
            raise DIED

    freed = []
    monkeypatch.setattr(jax_trainer.placement_groups, "free", lambda: freed.append(True))
    with pytest.raises(TrainingError, match=r"Ray's controller of the run died: .*the actor died"):
        jax_trainer.fit(Trainer(), None)
    assert freed


def test_the_history_of_all_attempts_is_one():
    step = lambda n: {"kind": "step", "step": n}  # noqa: E731
    first = [{"kind": "begin"}, {"kind": "started"}, step(1), step(2), step(3)]
    second = [{"kind": "begin"}, {"kind": "resumed", "events": [step(1), step(2)]}, {"kind": "started"}, step(3)]
    assert [e["step"] for e in one_history([*first, *second, step(4)]) if e["kind"] == "step"] == [1, 2, 3, 4]
    # Nothing had been saved: all begins again.
    assert [e["step"] for e in one_history([*first, {"kind": "begin"}, step(1)]) if e["kind"] == "step"] == [1]
    # The coordinator was started again in between, and rank 0 tells all.
    lost = [step(4), {"kind": "finished", "events": [*first, step(4)]}]
    assert [e["step"] for e in one_history(lost) if e["kind"] == "step"] == [1, 2, 3, 4]
