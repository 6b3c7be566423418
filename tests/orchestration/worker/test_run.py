"""A rank's run from begin to end, in this process: what it reports, saves and hands over."""

import json
import re
import time

import jax
import keras
import numpy as np
import pytest
import tiny
from local_runs import LocalChannel, held_out, spec_of, train
from loops import Recorder, logits_of, noted

from kithara_ray import Checkpointer
from kithara_ray.checkpoint import disk_format
from kithara_ray.checkpoint.run_files import read_trained
from kithara_ray.errors import TrainingError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.orchestration.cluster.process_setup import terminated
from kithara_ray.orchestration.head.coordinator import Coordinator
from kithara_ray.orchestration.request.snapshots import Snapshots
from kithara_ray.orchestration.worker.event_log import one_history
from kithara_ray.storage.places import Place
from kithara_ray.train.optimizer_config import portable

STEPS, EVERY = 8, 3


def checkpointer(out, **options):
    return Checkpointer(str(out / "checkpoints"), **{"save_interval_steps": EVERY, "max_to_keep": 2, **options})


def losses(ended) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in ended.result.history}


def steps_saved(out) -> list[int]:
    return [disk_format.step_of(name) for name in disk_format.committed(Place(str(out / "checkpoints")))]


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(tiny_models, tmp_path_factory):
    """One that saves, evaluates, writes an adapter on the way and has a callback: (its directory, what it ended as)."""
    out, directory = tmp_path_factory.mktemp("undisturbed"), tiny_models["llama"]
    spec = spec_of(
        directory,
        out,
        LocalChannel(),
        eval=held_out(directory),
        checkpointer=checkpointer(out),
        snapshots=Snapshots(6, str(out / "adapters")),
        callbacks=(Recorder(out / "told.jsonl"),),
    )
    return out, train(spec)


def test_events_come_in_one_order(undisturbed):
    _, ended = undisturbed
    phases = [event["name"] for event in ended.events if event["kind"] == "phase"]
    assert phases == ["fetch", "build", "look", "load", "compare", "compile"]
    kinds = [event["kind"] for event in ended.events if event["kind"] not in ("phase", "fetch")]
    steps = ["step"] * 4 + ["eval"] + ["step"] * 2 + ["export"] + ["step"] * 2 + ["eval"]
    assert kinds == ["begin", "started", "first_step", *steps, "finished"]
    assert {"tokenize", "schedule", "import", *phases} == ended.result.phases.keys() - {"first_step"}
    assert [row["step"] for row in ended.result.history] == list(range(1, STEPS + 1))
    assert [row["step"] for row in ended.result.eval_history] == [4, 8]
    # Who follows the run from its last event alone has all of its history.
    assert one_history(ended.events[-1:]) == [event for event in ended.events[:-1] if event["kind"] != "export"]


def test_what_a_run_saves_is_what_it_hands_over(undisturbed):
    out, ended = undisturbed
    where = Place(str(out / "checkpoints"))
    assert steps_saved(out) == [8, 6]
    assert len(where.directories()) == 2
    newest = disk_format.Checkpoint.open(where, disk_format.committed(where)[0])
    assert ended.result.checkpoint == newest.url
    assert newest.manifest["finished"] == ended.result.stopped == "steps"
    assert_same(ended.adapter, newest.adapter())
    assert max(np.abs(tensor).max() for name, tensor in ended.adapter.items() if "lora_B" in name) > 1e-3
    # Factors and two moments, and no weight of the base.
    size_bytes = sum(sum(where.files(name).values()) for name in where.directories())
    assert size_bytes < 2 * (3 * sum(tensor.nbytes for tensor in ended.adapter.values()) + 50_000)


def test_an_adapter_on_the_way_is_that_of_its_step(undisturbed):
    out, ended = undisturbed
    assert ended.result.exports == [{"step": 6, "path": f"{out}/adapters/step-000006", "error": None}]
    written = Adapter.read(out / "adapters" / "step-000006").tensors
    assert_same(written, read_trained(str(out / "checkpoints"), 6).adapter.tensors)


def test_callbacks_are_told_everything(undisturbed):
    out, ended = undisturbed
    told = out / "told.jsonl"
    assert noted(told, "start") == [[0, "run", 0, STEPS, {"trainer": {"steps": 8}}]]
    assert [metrics for _, metrics in noted(told, "step")] == ended.result.history
    assert [{"step": step, **metrics} for step, metrics in noted(told, "eval")] == ended.result.eval_history
    assert [step for step, _ in noted(told, "checkpoint")] == [3, 6, 8]
    assert noted(told, "checkpoint")[-1][1] == ended.result.checkpoint
    assert noted(told, "end") == [["steps", None]]


def test_a_run_that_fails_goes_on_to_the_same_bits(undisturbed, tiny_models, tmp_path):
    """It fails before step 6, whose step 3 is committed; the next one has all of the history, once."""
    directory, channel = tiny_models["llama"], LocalChannel()
    told = tmp_path / "told.jsonl"
    spec = spec_of(
        directory,
        tmp_path,
        channel,
        eval=held_out(directory),
        checkpointer=checkpointer(tmp_path),
        callbacks=(Recorder(told),),
    )

    def fail(run):
        if run.number == 6:
            run.saving.saver.wait()
            raise ValueError("the host is gone")

    with pytest.raises(ValueError, match="the host is gone"):
        train(spec, before_step=fail)
    assert noted(told, "end") == [["failed", "ValueError: the host is gone"]]
    ended, (_, expected) = train(spec), undisturbed
    [resumed] = [event for event in ended.events if event["kind"] == "resumed"]
    assert (resumed["step"], len(resumed["events"])) == (3, 3)
    assert losses(ended) == losses(expected)
    assert [row["step"] for row in ended.result.eval_history] == [4, 8]
    assert_same(ended.adapter, expected.adapter)


def test_a_finished_run_is_not_trained_again(undisturbed, tiny_models):
    out, expected = undisturbed
    directory = tiny_models["llama"]
    before = sorted((out / "checkpoints").rglob("*"))
    again = train(spec_of(directory, out, LocalChannel(), eval=held_out(directory), checkpointer=checkpointer(out)))
    assert sorted((out / "checkpoints").rglob("*")) == before
    assert not any(event["kind"] == "started" for event in again.events)
    assert losses(again) == losses(expected)
    assert_same(again.adapter, expected.adapter)


def test_a_coordinator_that_is_started_again_has_all_in_the_end(undisturbed, tiny_models, tmp_path):
    directory, channel = tiny_models["llama"], LocalChannel()
    spec = spec_of(directory, tmp_path, channel, eval=held_out(directory), checkpointer=checkpointer(tmp_path))

    def restart(run):
        if run.number == 5:
            channel.coordinator = Coordinator()

    ended, (_, expected) = train(spec, before_step=restart), undisturbed
    assert ended.events[0]["kind"] == "step"
    assert losses(ended) == losses(expected)
    assert sorted(losses(ended)) == list(range(1, STEPS + 1))
    channel.coordinator = Coordinator()  # once more, after it was sent everything
    assert_same(ended.adapter, expected.adapter)


# --- losses that are not finite ----------------------------------------------------------------------------------


def bad_batches(steps, keep):
    """A hook: the batches of these steps weigh NaN; `keep` is given each as it is trained on, by its step."""

    def spoil(run):
        batch = run.data.batch

        def spoiled(index):
            made, tokens = batch(index)
            if index + 1 in steps:
                keep[index + 1] = np.asarray(made["token_ids"])
                made = made | {"target_weights": made["target_weights"] * float("nan")}
            return made, tokens

        run.data.batch = spoiled

    return spoil


def rows_in(batch) -> set[int]:
    """The rows of the source by the tokens that went into the step; each row's own are no other's."""
    tokenizer = tiny.tokenizer()
    starts = [tokenizer(row["prompt"])["input_ids"] + tokenizer(row["answer"])["input_ids"] for row in tiny.rows(22)]
    ended = [[*ids, tokenizer.eos_token_id] for ids in starts]
    return {row for row, ids in enumerate(ended) for fed in batch if list(fed[: len(ids)]) == ids}


def test_a_loss_that_is_not_finite_ends_the_run_by_its_rows(tiny_models, tmp_path):
    """Logged every 8 steps: it is seen before."""
    fed = {}
    spec = spec_of(
        tiny_models["llama"], tmp_path, LocalChannel(), checkpointer=checkpointer(tmp_path), log_steps_interval=8
    )
    with pytest.raises(TrainingError, match=r"step 4: .* holds rows [\d, ]+ of the dataset") as caught:
        train(spec, built=bad_batches({4}, fed), before_step=lambda run: run.saving.saver.wait())
    named = {int(row) for row in re.search(r"rows ([\d, ]+) of", str(caught.value))[1].split(", ")}
    assert named == rows_in(fed[4])
    assert len(named) == 8
    assert steps_saved(tmp_path) == [3]


def test_a_skipped_step_changes_nothing_and_is_told(tiny_models, tmp_path):
    fed, params = {}, {}

    def keep(run):
        params[run.number - 1] = {name: np.asarray(array) for name, array in run.state["params"].items()}

    spec = spec_of(
        tiny_models["llama"], tmp_path, LocalChannel(), checkpointer=checkpointer(tmp_path), on_nan="skip", steps=6
    )
    ended = train(spec, built=bad_batches({4}, fed), before_step=keep)
    [skipped] = ended.result.skipped
    assert (skipped["step"], set(skipped["rows"])) == (4, rows_in(fed[4]))
    assert_same(params[3], params[4])
    assert any((params[4][name] != params[5][name]).any() for name in params[4])
    assert ended.result.stopped == "steps"
    assert np.isnan(losses(ended).pop(4))
    assert all(np.isfinite(tensor).all() for tensor in ended.adapter.values())
    # A checkpoint of the run carries it on.
    where = Place(str(tmp_path / "checkpoints"))
    events = disk_format.Checkpoint.open(where, disk_format.committed(where)[0]).events()
    assert [event["step"] for event in events if event["kind"] == "skipped"] == [4]


# --- leaving before the end --------------------------------------------------------------------------------------


def test_a_callback_ends_the_run_and_it_stays_ended(tiny_models, tmp_path):
    told = tmp_path / "told.jsonl"
    spec = spec_of(
        tiny_models["llama"],
        tmp_path,
        LocalChannel(),
        checkpointer=checkpointer(tmp_path, save_interval_steps=100),
        callbacks=(Recorder(told, stop_at=2),),
    )
    ended = train(spec)
    # Asked for at 2, cast at 3, looked at two steps later.
    assert (ended.result.stopped, ended.result.history[-1]["step"], steps_saved(tmp_path)) == ("callback", 5, [5])
    assert noted(told, "end") == [["callback", None]]
    assert_same(ended.adapter, read_trained(str(tmp_path / "checkpoints")).adapter.tensors)
    again = train(spec)
    assert (again.result.stopped, again.result.history[-1]["step"]) == ("callback", 5)


@pytest.mark.parametrize("required", [True, False])
def test_a_callback_that_raises_ends_the_run_or_is_dropped(tiny_models, tmp_path, required):
    told = tmp_path / "told.jsonl"
    spec = spec_of(
        tiny_models["llama"],
        tmp_path,
        LocalChannel(),
        callbacks=(Recorder(told, raise_at=2, required=required), Recorder(tmp_path / "other.jsonl")),
    )
    ended, problem = train(spec), "callback Recorder.on_step at step 2: ValueError: the moon is full"
    if required:
        assert (ended.summary["stopped"], ended.summary["callback_error"]) == ("callback_error", problem)
        assert noted(tmp_path / "other.jsonl", "end") == [["failed", problem]]
        assert ended.result.history[-1]["step"] == 5
        assert ended.adapter
    else:
        assert (ended.result.stopped, ended.result.dropped) == ("steps", [problem])
        assert noted(tmp_path / "other.jsonl", "end") == [["steps", None]]
    assert noted(told, "end") == []


def test_evaluations_that_do_not_improve_end_the_run(tiny_models, tmp_path):
    """At a rate of 0 none is better than the first; the best checkpoint is the newest of those alike."""
    directory = tiny_models["llama"]
    spec = spec_of(
        directory,
        tmp_path,
        LocalChannel(),
        optimizer=portable(keras.optimizers.SGD(0.0)),
        eval=held_out(directory, every_steps=1),
        checkpointer=checkpointer(tmp_path, score_attribute="eval_loss", early_stopping_patience=2),
    )
    ended = train(spec)
    assert (ended.result.stopped, [row["step"] for row in ended.result.eval_history]) == ("early_stopping", [1, 2, 3])
    assert disk_format.step_of(ended.result.best_checkpoint.rpartition("/")[2]) == 3
    again = train(spec)
    assert (again.result.stopped, again.result.history[-1]["step"]) == ("early_stopping", 3)


def test_epochs_are_evaluated_where_they_end(tiny_models, tmp_path):
    directory = tiny_models["llama"]
    evaluation = held_out(directory, every_steps=None, every_epochs=1)
    ended = train(spec_of(directory, tmp_path, LocalChannel(), steps=None, epochs=2, eval=evaluation))
    # 22 rows in batches of 8.
    assert [row["step"] for row in ended.result.eval_history] == [3, 6]
    assert ended.result.history[-1]["epoch"] == 2


def test_an_interrupt_saves_and_leaves(tiny_models, tmp_path):
    channel = LocalChannel()
    spec = spec_of(
        tiny_models["llama"], tmp_path, channel, checkpointer=checkpointer(tmp_path, save_interval_steps=100)
    )

    def ask(run):
        if run.number == 2:
            channel.coordinator.ask("interrupt")
            deadline = time.monotonic() + 30
            while run.log.heart.asked is None:  # the answer to the next beat
                assert time.monotonic() < deadline
                time.sleep(0.02)

    ended = train(spec, before_step=ask)
    assert (ended.summary["stopped"], steps_saved(tmp_path)) == ("interrupt", [4])
    # It was not what ends a run: it goes on.
    channel.coordinator.start_run()
    again = train(spec)
    assert [row["step"] for row in again.result.history] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("saves", [True, False])
def test_a_machine_that_is_taken_away(tiny_models, tmp_path, monkeypatch, saves):
    how = {"checkpointer": checkpointer(tmp_path, save_interval_steps=100)} if saves else {}
    spec = spec_of(tiny_models["llama"], tmp_path, LocalChannel(), **how)
    saved = "step 4 is saved" if saves else r"nothing was saved: give Trainer\(checkpointer=...\)"
    try:
        with pytest.raises(TrainingError, match=rf"^preempted: rank 0 on \S+ received SIGTERM; {saved}$"):
            train(spec, before_step=lambda run: run.number == 2 and terminated.set())
    finally:
        terminated.clear()
    assert steps_saved(tmp_path) == ([4] if saves else [])


def test_a_node_that_drains_is_saved_for_once(tiny_models, tmp_path):
    """The run goes on until the cluster ends it."""
    channel = LocalChannel()
    spec = spec_of(
        tiny_models["llama"],
        tmp_path,
        channel,
        checkpointer=checkpointer(tmp_path, save_interval_steps=100, max_to_keep=None),
    )

    def drain(run):
        channel.draining = run.number >= 2

    ended = train(spec, before_step=drain)
    assert (ended.result.stopped, steps_saved(tmp_path)) == ("steps", [8, 4])


# --- what is handed over -----------------------------------------------------------------------------------------


def test_an_adapter_that_cannot_be_written_ends_nothing(tiny_models, tmp_path):
    (tmp_path / "file").touch()
    snapshots = Snapshots(2, str(tmp_path / "file" / "below"))
    ended = train(spec_of(tiny_models["llama"], tmp_path, LocalChannel(), snapshots=snapshots, steps=3))
    [export] = ended.result.exports
    assert (export["step"], "cannot be written" in export["error"]) == (2, True)
    assert ended.result.stopped == "steps"


def test_trained_weights_are_handed_over_slice_by_slice(tiny_models, tmp_path):
    channel = LocalChannel()
    ended = train(spec_of(tiny_models["llama"], tmp_path, channel, lora=None, steps=2))
    where = channel.coordinator.publish_weights(1)
    assert where == f"{ended.run.spec.directory}/model"
    base, trained = BaseCheckpoint.open(tiny_models["llama"]), BaseCheckpoint.open(where)
    assert trained.names == base.names
    for name in base.names:
        assert (trained.view(name) != base.view(name)).any(), name
    assert all(np.asarray(array).dtype == np.float32 for array in jax.tree.leaves(ended.run.state["params"]))
    assert json.loads((tmp_path / "runs" / "run" / "model" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.long
def test_weights_of_blocks_in_periods_compute_in_transformers_what_was_trained(tiny_models, tmp_path):
    """tests/orchestration/test_full_parameters.py has the same of two workers, and of blocks that are alike."""
    import torch
    from transformers import AutoModelForCausalLM

    channel, tokens = LocalChannel(), np.random.default_rng(0).integers(3, tiny.VOCABULARY, (4, 24)).astype(np.int32)
    optimizer = portable(keras.optimizers.AdamW(3e-3))
    ended = train(spec_of(tiny_models["gemma2"], tmp_path, channel, lora=None, steps=3, optimizer=optimizer))
    plain, trained = (
        AutoModelForCausalLM.from_pretrained(directory).eval()
        for directory in (tiny_models["gemma2"], channel.coordinator.publish_weights(1))
    )
    with torch.no_grad():
        before, theirs = (model(torch.tensor(tokens).long()).logits.numpy() for model in (plain, trained))
    np.testing.assert_allclose(logits_of(ended.run, tokens), theirs, atol=1e-4, rtol=0)
    assert np.abs(theirs - before).max() > 0.1
