"""What a run tells while it goes on: the run of `observed`, which a callback ends, and one whose callback raises."""

import json
import logging
import time
import urllib.request

import keras
import numpy as np
import pytest
import ray
import tiny
from jax.profiler import ProfileData
from loops import Recorder, loop_with, noted, use
from observed import EVERY, LAST, PROMPTS, STOP_AT
from ray.train import FailureConfig, RunConfig, ScalingConfig

from kithara_ray import Callback, Checkpointer, Dataloader, KerasHubModel, SFTDataset, Trainer
from kithara_ray.callbacks import RunInfo
from kithara_ray.checkpoint.run_files import read_trained
from kithara_ray.errors import TrainingError
from kithara_ray.orchestration.driver.progress import Progress, figures_of
from kithara_ray.orchestration.driver.samples import Samples
from kithara_ray.orchestration.worker import throughput as figures_module
from kithara_ray.orchestration.worker.callback_runner import Calls, RayMetrics
from kithara_ray.orchestration.worker.throughput import Figures
from kithara_ray.orchestration.worker.votes import FAILED, GO_ON, STOP
from kithara_ray.plan.chips import CHIPS, chip_of_kind


def make_trainer(directory, root, **kwargs):
    model = KerasHubModel.from_preset(directory, lora_rank=4, precision="float32")
    data = SFTDataset(tiny.rows(22), tokenizer_handle=directory, max_seq_len=64)
    return Trainer(
        model=model,
        optimizer=keras.optimizers.AdamW(1e-2),
        train_dataloader=Dataloader(data, per_device_batch_size=4),
        scaling_config=ScalingConfig(num_workers=2),
        progress=False,
        **kwargs,
    )


def test_rank_0_alone_is_told_everything(observed):
    root, result = observed.root, observed.result
    told = root / "told.jsonl"
    [[rank, name, step, total, settings]] = noted(told, "start")
    assert (rank, name, step, total, settings["optimizer"]["class_name"]) == (0, "run", 0, 30, "AdamW")
    assert [metrics for _, metrics in noted(told, "step")] == result.history
    assert [{"step": step, **metrics} for step, metrics in noted(told, "eval")] == result.eval_history
    saved = noted(told, "checkpoint")
    assert [step for step, _ in saved] == [EVERY, 2 * EVERY, LAST]
    assert saved[-1][1] == result.checkpoint
    assert noted(told, "end") == [["callback", None]]


def test_a_callback_ends_the_run_on_all_ranks(observed):
    result = observed.result
    assert result.stopped == "callback"
    assert result.history[-1]["step"] == LAST == STOP_AT + 3
    for name, tensor in read_trained(str(observed.root / "checkpoints")).adapter.tensors.items():
        assert np.array_equal(observed.model.adapter[name], tensor), name


def test_tensorboard_has_every_number(observed):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    root, result = observed.root, observed.result
    [path] = (root / "board").iterdir()
    raw, found = path.read_bytes(), {}
    while raw:
        length = int.from_bytes(raw[:8], "little")
        assert int.from_bytes(raw[8:12], "little") == masked_crc32c(raw[:8])
        event = Event.FromString(raw[12 : 12 + length])
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
        raw = raw[16 + length :]
    for group, rows in (("train", result.history), ("eval", result.eval_history)):
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    tag = f"{group}/{name.removeprefix('eval_')}"
                    assert found[tag, row["step"]] == pytest.approx(value, rel=1e-6), tag


def test_the_trace_holds_the_chosen_steps(observed):
    [path] = (observed.root / "trace").rglob("*.xplane.pb")
    planes = {plane.name for plane in ProfileData.from_file(str(path)).planes}
    assert any("CPU" in plane for plane in planes)
    assert path.stat().st_size > 10_000


def test_wandb_has_them_too(observed):
    root, result = observed.root, observed.result
    [path] = root.rglob("run-*.wandb")
    raw = path.read_bytes()
    assert b"train/loss" in raw
    assert b"eval/perplexity" in raw
    assert repr(result.history[-1]["loss"]).encode() in raw


def test_the_report_tells_the_run(observed):
    root, result = observed.root, observed.result
    told = json.loads((root / "run" / "history.json").read_text())
    assert [
        {k: v for k, v in e.items() if k != "kind"} for e in told["events"] if e["kind"] == "step"
    ] == result.history
    plain, other = told["samples"]
    assert [plain["prompt"], other["prompt"]] == PROMPTS
    assert plain["after"] != plain["before"]
    assert other["after"] != other["before"]
    assert [export["path"] for export in told["exports"]] == [
        str(root / name) for name in ("adapter", "both", "merged")
    ]
    export = told["exports"][0]
    assert export["checks"] == ["adapter reopened; tensors equal those given bit by bit, scales equal"]
    html = (root / "run" / "report.html").read_text()
    for expected in (
        "stopped by a callback",
        "&lt;b&gt;2 + 2&lt;/b&gt;",
        "22",
        export["checks"][0],
        "went on without it",
    ):
        assert expected in html, expected
    lengths = json.loads((root / "run" / "run.json").read_text())["data"]["train"]["lengths"]
    assert list(lengths) == ["min", "median", "p95", "max"]


def test_a_tracker_that_fails_is_left_out(observed):
    assert observed.result.dropped == ["callback Careless.on_step at step 1: OSError: the tracker is away"]


def not_finite_at(step):
    """A loop of which one step has a loss that is not finite, on every rank."""

    def spoil(run, metrics):
        if run.number == step:
            return metrics | {"loss": metrics["loss"] * float("nan")}

    return loop_with(after_step=spoil)


@pytest.mark.long
def test_one_that_raises_ends_the_run_by_its_name(cluster, tiny_models, tmp_path, monkeypatch):
    """Both ranks leave out the same step, and leave at the same step; nothing is tried again; what was trained is
    there."""
    use(not_finite_at(2), monkeypatch)
    trainer = make_trainer(
        str(tiny_models["llama"]),
        tmp_path,
        steps=30,
        on_nan="skip",
        checkpointer=Checkpointer(str(tmp_path / "checkpoints"), save_interval_steps=100),
        run_config=RunConfig(storage_path=str(tmp_path), name="run", failure_config=FailureConfig(max_failures=2)),
        callbacks=[Recorder(tmp_path / "told.jsonl", raise_at=3)],
    )
    message = r"callback Recorder.on_step at step 3: ValueError: the moon is full; saved: .*/step-00000006-"
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert len(noted(tmp_path / "told.jsonl", "start")) == 1
    html = (tmp_path / "run" / "report.html").read_text()
    assert "callback Recorder.on_step at step 3: ValueError: the moon is full" in html
    assert 'id="chart-loss"' in html
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (manifest["status"], "the moon is full" in manifest["error"]) == ("failed", True)
    trained = read_trained(str(tmp_path / "checkpoints"), step=6).adapter.tensors
    assert all(np.array_equal(trainer.model.adapter[name], tensor) for name, tensor in trained.items())
    told = json.loads((tmp_path / "run" / "history.json").read_text())["events"]
    [skipped] = [event for event in told if event["kind"] == "skipped"]
    assert (skipped["step"], len(set(skipped["rows"]))) == (2, 8)


def test_rays_own_metrics(cluster):
    """As Prometheus reads them from the node's agent: pushed every few seconds, and gone again when they grow old."""
    metrics, info = RayMetrics(), RunInfo("mine", "/x", 0, 9, 10, 1)
    metrics.on_start(info)
    metrics.on_step(info, 7, {"loss": 1.25, "tokens_per_s": 300.0, "grad_norm": 1.0})
    [node] = ray.nodes()
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    wanted = {"kithara_ray_loss": "1.25", "kithara_ray_tokens_per_s": "300.0", "kithara_ray_step": "7.0"}

    def exported() -> bool:
        lines = urllib.request.urlopen(address, timeout=10).read().decode().splitlines()
        return all(
            any(line.startswith(f"ray_{name}{{") and 'run="mine"' in line and line.endswith(value) for line in lines)
            for name, value in wanted.items()
        )

    deadline = time.monotonic() + 30
    while not exported():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_samples_that_cannot_be_made_end_nothing():
    class Away:
        def generate(self, *arguments, **settings):
            raise MemoryError("4 GB")

        def unload(self):
            pass

    samples = Samples(Away(), ["a", [{"role": "user", "content": "b"}, {"role": "system", "content": "c"}]], 64)
    samples.take("before")
    why = "not generated: MemoryError: 4 GB"
    assert samples.rows == [{"prompt": "a", "before": why}, {"prompt": "user: b\nsystem: c", "before": why}]


def test_figures_of_a_step():
    """Of a TPU all of them; of a CPU neither MFU nor memory."""
    row = {"loss": 1.23456, "learning_rate": 2e-4, "tokens_per_s": 61_000.4, "step_time_s": 2.0, "input_wait_s": 0.01}
    assert figures_of(row) == "loss=1.2346 lr=0.0002 tokens_per_s=61000 input_wait=0.5%"
    row |= {"mfu": 0.3126, "hbm_bytes": 9 * 2**30, "hbm_limit_bytes": 16 * 2**30}
    assert figures_of(row).endswith("input_wait=0.5% mfu=31.3% hbm=9.0/16.0GiB")
    figures = Figures(1000, is_lora=True, devices=4)
    assert figures.of(100.0) == {}
    assert chip_of_kind("TPU v5 lite") is chip_of_kind("TPU v5e") is CHIPS["v5e"]
    assert (chip_of_kind("TPU v6 lite"), chip_of_kind("TPU v5p"), chip_of_kind("cpu")) == (
        CHIPS["v6e"],
        CHIPS["v5p"],
        None,
    )


@pytest.mark.parametrize(("is_lora", "flops"), [(True, 4), (False, 6)])
def test_flops_against_the_peak(monkeypatch, is_lora, flops):
    monkeypatch.setattr(figures_module, "chip_of_kind", lambda kind: CHIPS["v5e"])
    of = Figures(2_000_000_000, is_lora, devices=16).of(10_000.0)
    assert of == {"mfu": pytest.approx(flops * 2e9 * 1e4 / (16 * 197e12))}


def test_lines_where_there_is_no_terminal(capsys):
    progress = Progress()
    row = {"loss": 1.0, "learning_rate": 1e-3, "tokens_per_s": 10.0, "step_time_s": 2.0, "input_wait_s": 0.0}
    begun = {"kind": "started", "trainable": 1, "parameters": 10, "total_steps": 100, "phases": {"build": 1.0}}
    for event in (begun, {"kind": "step", "step": 40, **row}, {"kind": "step", "step": 100, **row}):
        progress._show(event)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [
        "step=40 loss=1.0000 lr=0.001 tokens_per_s=10 input_wait=0.0% eta=0:02:00",
        "step=100 loss=1.0000 lr=0.001 tokens_per_s=10 input_wait=0.0%",
    ]


class Failing(Callback):
    def __init__(self, method: str, required: bool):
        self.required = required
        setattr(self, method, self._raise)

    def _raise(self, *arguments):
        raise ValueError("no")


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("method", ["on_start", "on_step", "on_eval", "on_checkpoint", "on_end"])
def test_what_becomes_of_an_error(method, required, caplog):
    caplog.set_level(logging.CRITICAL)
    dropped, told = [], []

    class Other(Callback):
        def on_step(self, run, step, metrics):
            told.append(step)
            metrics.clear()

    calls = Calls([Failing(method, required), Other()], dropped.append)
    problem = calls.start(RunInfo("mine", "/x", 4, 9, 10, 1))
    row = {"loss": 1.0}
    for number in (5, 6):
        calls.step(number, row)
        calls.evaluation(number, {})
        calls.checkpoint(number, "/c")
    calls.end(6, "steps")
    expected = f"callback Failing.{method} at step {dict(on_start=4, on_end=6).get(method, 5)}: ValueError: no"
    fails = required or method == "on_start"
    assert (calls.problem, dropped) == ((expected, []) if fails else (None, [expected]))
    assert problem == (expected if method == "on_start" else "")
    assert calls.vote == (FAILED if fails else GO_ON)
    assert (told, row) == ([5, 6], {"loss": 1.0})
    calls.info.stop()
    assert calls.vote == (FAILED if fails else STOP)
