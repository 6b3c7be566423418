"""The result of a run, read from the events that its ranks reported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kithara_ray.errors import TrainingError
from kithara_ray.orchestration.worker.event_log import Event, one_history, rows_of
from kithara_ray.orchestration.worker.spec import RunSpec


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        metrics: metrics of the last logged step and of the last evaluation.
        history: one dict per logged step: step, loss, learning_rate, grad_norm, tokens_per_s (real tokens, no padding),
            step_time_s, input_wait_s (per step), epoch; on a TPU also mfu, hbm_bytes and hbm_limit_bytes of rank 0.
            For a mixture also expert_load, the tokens of the fullest expert as a multiple of the mean, in the block
            where it is largest; expert_load/NN, that of block NN; and router_aux_loss if it is trained on.
        eval_history: one dict per evaluation: step, eval_loss, eval_perplexity, eval_tokens.
        phases: seconds of each phase of start-up on rank 0, from `train()` to the end of the first step.
        path: the run's directory, on the head node or a URL. `adapter/` in it is the trained PEFT adapter. If all
            weights were trained, `model/` is a Hugging Face model with them, in the dtype of the training. run.json
            describes the run.
        checkpoint, best_checkpoint: the newest, and the best by the checkpointer's `score_attribute`.
        stopped: reason for the end: "steps", "early_stopping", "callback" (a callback ended the run) or "interrupt".
        skipped: steps that on_nan="skip" left out, each with step and rows.
        exports: one dict per adapter written during the run: step, path, error (None if it was written).
        dropped: callbacks that failed and that the run went on without, with the reason.
    """

    metrics: dict[str, float]
    history: list[dict[str, float]]
    path: str
    eval_history: list[dict[str, float]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    best_checkpoint: str | None = None
    stopped: str = "steps"
    skipped: list[dict[str, Any]] = field(default_factory=list)
    exports: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def result_of(events: list[Event], path: str, summary: Mapping[str, Any]) -> TrainResult:
    """Return the result of a run that has ended in order.

    Args:
        events: the events of all attempts.
        summary: the value that rank 0's loop returned.
    """
    events = one_history(events)
    history, evaluations, started = (rows_of(events, kind) for kind in ("step", "eval", "started"))
    phases = started[-1]["phases"] if started else {}
    for event in rows_of(events, "first_step"):
        phases = phases | {"first_step": event["seconds"]}
    metrics = (history[-1] if history else {}) | (evaluations[-1] if evaluations else {})
    return TrainResult(
        metrics,
        history,
        path,
        evaluations,
        phases,
        checkpoint=summary.get("checkpoint"),
        best_checkpoint=summary.get("best_checkpoint"),
        stopped=summary.get("stopped") or "steps",
        skipped=rows_of(events, "skipped"),
        exports=rows_of(events, "export"),
        dropped=[event["text"] for event in rows_of(events, "dropped")],
    )


def about(spec: RunSpec, events: list[Event]) -> dict[str, Any]:
    """Describe how a model was trained, as plain data: for run.json and the model card of its exports."""
    events = one_history(events)
    steps, evaluations = rows_of(events, "step"), rows_of(events, "eval")
    last = steps[-1] if steps else {}
    kind, value = spec.step.optimizer
    config = value["config"] if kind == "keras" else {}
    plain = {name: item for name, item in config.items() if isinstance(item, (int, float, str)) and name != "name"}
    told = {
        "optimizer": value["class_name"] if kind == "keras" else kind,
        "optimizer_settings": plain,
        "rows_per_device_and_step": spec.train.rows_per_device,
        "micro_batches": spec.step.micro_batches,
        "workers": spec.num_workers,
        "precision": spec.model.precision,
        "router_aux_loss_coef": spec.step.router_aux_loss_coef or None,
        "seed": spec.step.seed,
        "data_fingerprint": spec.train.store.content,
        "rows": spec.train.store.num_rows,
        "packed_to": spec.train.packed_len,
        "last_step": {name: last[name] for name in ("step", "epoch", "loss") if name in last},
        "evaluation": evaluations[-1] if evaluations else {},
    }
    return {name: value for name, value in told.items() if value not in (None, "", {})}


def raise_for_end(summary: Mapping[str, Any], path: str) -> None:
    """Raise the error that ended an early-stopped run, if there was one.

    Args:
        path: location of the trained tensors, if no checkpoint holds them.
    """
    saved = f"saved: {summary.get('checkpoint') or path}"
    if summary["stopped"] == "interrupt":
        raise KeyboardInterrupt(f"the run was interrupted; {saved}")
    if summary.get("callback_error"):
        raise TrainingError(f"{summary['callback_error']}; {saved}")
