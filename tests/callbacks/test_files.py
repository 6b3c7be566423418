"""What is written to an object store, and by whom it is read again; no Ray."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData
from tensorboardX.proto.event_pb2 import Event

from kithara_ray.callbacks import MLflow, Profiler, RunInfo, TensorBoard, WandB, profiler, tensorboard
from kithara_ray.errors import DestinationError
from kithara_ray.storage.places import Place


def info(step: int = 0) -> RunInfo:
    return RunInfo("mine", "/runs/mine", step, 9, 100, 10, {"trainer": {"steps": 9}})


def events(raw: bytes) -> list[Event]:
    """TFRecord: length, checksum, data, checksum."""
    found = []
    while raw:
        length = int.from_bytes(raw[:8], "little")
        found.append(Event.FromString(raw[12 : 12 + length]))
        raw = raw[16 + length :]
    return found


def test_tensorboard_on_an_object_store(monkeypatch):
    """Put anew as it grows, whole each time; a run that goes on hides what came after its checkpoint."""
    place = Place("memory://board")
    for step, purges in ((0, False), (4, True)):
        monkeypatch.setattr(tensorboard, "_PUT_EVERY_S", 0.0)
        board = TensorBoard("memory://board")
        board.on_start(info(step))
        assert place.files("") == {}
        board.on_step(info(), step + 1, {"step": step + 1, "loss": 0.5})
        [name] = place.files("")
        before = events(place.read("", name))
        monkeypatch.setattr(tensorboard, "_PUT_EVERY_S", 1e9)
        board.on_eval(info(), step + 1, {"eval_loss": 0.25})
        assert len(events(place.read("", name))) == len(before)
        board.on_end(info(), "steps", None)
        after = events(place.read("", name))
        values = {(v.tag, e.step): v.simple_value for e in after for v in e.summary.value}
        assert (values["train/loss", step + 1], values["eval/loss", step + 1]) == (0.5, 0.25)
        assert [e.step for e in after if e.session_log.status == e.session_log.START] == [step + 1] * purges
        assert not board._local.exists()
        place.remove("", [name])


def test_a_place_that_cannot_be_written_is_told_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match="cannot be written"):
        TensorBoard(str(tmp_path / "file" / "below")).on_start(info())


def test_a_trace_on_an_object_store():
    tracer = profiler.Tracer(Profiler("memory://trace", steps=(2, 3)))
    state = jnp.ones(8)
    for number in range(1, 6):
        tracer.before(number, state)
        with jax.profiler.TraceAnnotation(f"the work of step {number}"):
            state = jnp.sin(state) + 1
        tracer.after(number, state)
    tracer.finish(state)
    fs = Place("memory://trace").fs
    [path] = [name for name in fs.find("/trace") if name.endswith(".xplane.pb")]
    assert "/plugins/profile/" in path
    planes = ProfileData.from_serialized_xspace(fs.cat_file(path)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert {name for name in names if name.startswith("the work")} == {"the work of step 2", "the work of step 3"}


def test_a_trace_whose_last_step_never_comes(tmp_path):
    tracer = profiler.Tracer(Profiler(str(tmp_path), steps=(2, 30)))
    tracer.before(2, jnp.ones(8))
    tracer.after(2, jnp.ones(8))
    tracer.finish()
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("tracker", [WandB(mode="offline"), MLflow()])
def test_a_library_that_is_not_there_is_named(tracker, monkeypatch):
    library = type(tracker).__name__.lower()
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ValueError, match=f"{library} is not installed on rank 0's host.*install it on all nodes"):
        tracker.on_start(info())


def test_mlflow_goes_on_with_the_run_that_it_began(tmp_path):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for step, outcome, error in ((0, "failed", "the host died"), (4, "steps", None)):
        tracker = MLflow(tracking_uri=uri, tags={"team": "a"})
        tracker.on_start(info(step))
        tracker.on_step(info(), step + 1, {"step": step + 1, "loss": 0.5})
        tracker.on_eval(info(), step + 1, {"eval_loss": 0.25})
        tracker.on_end(info(), outcome, error)
    client = mlflow.MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("kithara_ray").experiment_id])
    assert (run.info.status, run.data.tags["team"], run.data.params["trainer.steps"]) == ("FINISHED", "a", "9")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 5]
    assert [m.value for m in client.get_metric_history(run.info.run_id, "eval/loss")] == [0.25, 0.25]
