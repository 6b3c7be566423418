"""Turn a request into the workers' RunSpec: first tokenised data, then rows per device, then the spec."""

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kithara_ray.callbacks import TensorBoard
from kithara_ray.orchestration.data.data_spec import DataSpec
from kithara_ray.orchestration.data.datasets import Dataloader, MixedDataset, RowDataset
from kithara_ray.orchestration.data.held_out import tokenize_and_hold_out
from kithara_ray.orchestration.data.pipeline import tokenize, tokenize_whole
from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.orchestration.data.unbounded import EndlessStore
from kithara_ray.orchestration.driver.phases import Phases
from kithara_ray.orchestration.preflight.memory_fit import Fit
from kithara_ray.orchestration.request.facts import count_devices, vocabulary
from kithara_ray.orchestration.request.run_request import RunRequest
from kithara_ray.orchestration.worker.callback_runner import RayMetrics
from kithara_ray.orchestration.worker.channel import Channel
from kithara_ray.orchestration.worker.heartbeat import Limits
from kithara_ray.orchestration.worker.spec import EvalSpec, ModelSpec, RunSpec, Start

# A process sends a beat each second. A frozen process sends none, and neither does one whose host is gone.
SILENCE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Tokenized:
    """A run's data as tokens.

    Attributes:
        eval: the evaluation data; None if the run evaluates nothing.
    """

    train: TokenStore | EndlessStore
    eval: TokenStore | EndlessStore | None

    def largest_shape(self, request: RunRequest) -> tuple[int, int]:
        """Return (T, K), positions and predictions of a row, of the largest training batch."""
        loader = request.train
        return self.train.shapes(request.group.platform, loader.packed_len, loader.length_buckets)[-1]


def loading_tokenizers(request: RunRequest, phases: Phases) -> threading.Thread:
    """Load a run's tokenizers in a thread, and return it: transformers is imported while checks wait for tasks."""
    loaders = [loader.dataset for _, loader in request.loaders()]
    datasets = [
        part for dataset in loaders for part in (dataset.datasets if isinstance(dataset, MixedDataset) else [dataset])
    ]

    def load() -> None:
        with phases.beside("tokenizer"):
            for dataset in datasets:
                with contextlib.suppress(Exception):  # raised again where the tokenizer is needed
                    dataset.row_tokenizer().loaded()

    thread = threading.Thread(target=load, name="tokenizers", daemon=True)
    thread.start()
    return thread


def tokenized(request: RunRequest) -> Tokenized:
    """Tokenise a run's data on the cluster. Raises DataError."""
    known = vocabulary(request)
    train, asked = request.train, request.evaluation
    if train.eval_fraction is not None:
        stores = tokenize_and_hold_out(train.dataset, train.eval_fraction, train.seed, known)
        return Tokenized(*stores)
    store, held_out = tokenize(train.dataset, known), None
    if asked is not None:
        dataset = asked.loader.dataset
        if isinstance(dataset, RowDataset) and dataset.is_endless:
            assert asked.max_samples is not None  # the request asks for it
            dataset = dataset.head(asked.max_samples)
        held_out = tokenize_whole(dataset, known)
    return Tokenized(store, held_out)


def run_spec(
    request: RunRequest,
    data: Tokenized,
    fit: Fit,
    adapter: Mapping[str, np.ndarray] | None,
    settings: Mapping[str, Any],
    channel: Channel,
    start: Start,
) -> RunSpec:
    """Return the workers' spec.

    Args:
        fit: rows per device, and the plan that found them.
        adapter: tensors to continue from; None starts from PEFT's initial factors.
        settings: the run's arguments, as in run.json.
        channel: the channel to the head.
        start: the driver's part of the run's start.
    """
    model, group, reporting = request.model, request.group, request.reporting
    board = [TensorBoard(reporting.tensorboard_dir)] if reporting.tensorboard_dir else []
    return RunSpec(
        model=ModelSpec(model.weights_handle, model.lora, model.precision, model.quantize, adapter),
        train=_data(request.train, data.train, fit.rows_per_device * request.step.micro_batches),
        steps=request.steps,
        epochs=request.epochs,
        eval=_evaluation(request, data, fit.rows_per_device),
        step=request.step,
        platform=group.platform,
        num_workers=group.num_workers,
        num_devices=count_devices(request),
        directory=request.directory,
        checkpointer=request.checkpointer,
        snapshots=request.snapshots,
        log_steps_interval=reporting.log_steps_interval,
        limits=limits_of(request),
        callbacks=(RayMetrics(), *board, *reporting.callbacks),
        profiler=reporting.profiler,
        settings=settings,
        plan=fit.plan,
        start=start,
        channel=channel,
    )


def limits_of(request: RunRequest) -> Limits:
    """Return the watchdog's time limits for the run."""
    save_timeout_s = request.checkpointer.save_timeout_s if request.checkpointer else 0.0
    return Limits(request.timeouts.step_s, request.timeouts.startup_s, save_timeout_s, SILENCE_TIMEOUT_S)


def _evaluation(request: RunRequest, data: Tokenized, training_rows: int) -> EvalSpec | None:
    asked = request.evaluation
    if asked is None or data.eval is None:
        return None
    rows = asked.loader.per_device_batch_size
    held_out = _data(asked.loader, data.eval, training_rows if isinstance(rows, str) else rows)
    return EvalSpec(held_out, asked.every_steps, asked.every_epochs, asked.max_samples)


def _data(loader: Dataloader, store: TokenStore | EndlessStore, rows_per_device: int) -> DataSpec:
    return DataSpec(
        store=store,
        rows_per_device=rows_per_device,
        packed_len=loader.packed_len,
        buckets=loader.length_buckets,
        shuffle=loader.shuffle,
        shuffle_rows=loader.shuffle_rows,
        seed=loader.seed,
    )
