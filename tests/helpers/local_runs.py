"""A rank's run in the test's own process: the workers' loop and a real `Coordinator`, without Ray between them."""

import dataclasses
import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import tiny
from loops import loop_with

from kithara_ray import SFTDataset
from kithara_ray.hf.lora_config import LoraConfig
from kithara_ray.orchestration.data import sources
from kithara_ray.orchestration.data.data_spec import DataSpec
from kithara_ray.orchestration.data.token_store import TokenStore
from kithara_ray.orchestration.head.coordinator import Coordinator
from kithara_ray.orchestration.request.run_request import StepSettings
from kithara_ray.orchestration.results import TrainResult, result_of
from kithara_ray.orchestration.worker.channel import AdapterSpec
from kithara_ray.orchestration.worker.heartbeat import Limits
from kithara_ray.orchestration.worker.spec import EvalSpec, ModelSpec, RunSpec, Start
from kithara_ray.train.optimizer_config import portable


def carried(value: Any) -> Any:
    """As it comes out of another process: nothing is shared with the sender."""
    return pickle.loads(pickle.dumps(value))


@dataclass
class LocalChannel:
    """See `kithara_ray.orchestration.worker.channel.Channel`.

    Attributes:
        coordinator: may be put in the place of one that died.
        draining: what the rank is told of its node.
    """

    coordinator: Coordinator = field(default_factory=Coordinator)
    draining: bool = False
    node_id = "here"

    def record(self, event, wait=False):
        self.coordinator.record(carried(event))

    def beat(self, beat, limits):
        return self.coordinator.beat(beat, limits)

    def is_draining(self):
        return self.draining

    def put_shards(self, rank, shards):
        self.coordinator.put_shards(rank, carried(shards))

    def put_snapshot(self, part):
        self.coordinator.put_snapshot(carried(part))
        return lambda: None

    def begin_weights(self, weights):
        return self.coordinator.begin_weights(carried(weights))

    def put_slices(self, token, slices):
        for part in slices:
            self.coordinator.put_slice(token, carried(part))


class LocalStore(TokenStore):
    """A tokenised dataset whose blocks are in this process."""

    def block(self, number):
        return self.blocks[number]

    def kept_bytes(self):
        return 2**20


def tokenized(rows: list[dict], directory: str) -> LocalStore:
    dataset = SFTDataset(rows, tokenizer_handle=directory, max_seq_len=64)
    tokenizer = dataset.row_tokenizer()
    [(work, _)] = sources.work(rows)
    block = work.tokenize(tokenizer)
    starts = np.array([0, len(block.lengths)])
    return LocalStore((block,), block.lengths, block.trained(), starts, tokenizer.pad_id, block.content())


def data_spec(rows: list[dict], directory: str, rows_per_device: int) -> DataSpec:
    return DataSpec(tokenized(rows, directory), rows_per_device, None, 1, shuffle=True, shuffle_rows=None, seed=1)


def spec_of(directory: Path, out: Path, channel: LocalChannel, **changes: Any) -> RunSpec:
    """A run on all devices of this process: 8 steps of 8 of 22 rows, so that the epoch turns twice.

    Args:
        changes: fields of RunSpec, ModelSpec and StepSettings, by their names.
    """
    base, now = str(directory), time.time()
    lora = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.1)
    schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 8, 1e-3)
    model = ModelSpec(base, lora, "float32", quantize=None, adapter=None)
    optimizer = portable(keras.optimizers.AdamW(schedule))
    step = StepSettings(optimizer, None, "block", micro_batches=1, seed=2, on_nan="stop")
    parts = {"model": _replaced(model, changes), "step": _replaced(step, changes)}
    fields = dict(
        train=data_spec(tiny.rows(22), base, 8 // jax.device_count()),
        steps=8,
        epochs=None,
        eval=None,
        platform="cpu",
        num_workers=1,
        num_devices=jax.device_count(),
        directory=str(out / "runs" / "run"),
        checkpointer=None,
        snapshots=None,
        log_steps_interval=1,
        # Nobody ends a test's process.
        limits=Limits(None, 3600.0, 900.0, silence_timeout_s=1e9),
        callbacks=(),
        profiler=None,
        settings={"trainer": {"steps": 8}},
        plan=None,
        start=Start(now, now, {"tokenize": 0.0}),
        channel=channel,
    )
    return RunSpec(**{**fields, **parts, **changes})


def _replaced(part: Any, changes: dict[str, Any]) -> Any:
    own = [name.name for name in dataclasses.fields(part) if name.name in changes]
    return dataclasses.replace(part, **{name: changes.pop(name) for name in own})


def held_out(directory: Path, every_steps: int | None = 4, every_epochs: int | None = None) -> EvalSpec:
    return EvalSpec(data_spec(tiny.rows(5), str(directory), 1), every_steps, every_epochs, max_samples=None)


@dataclass(frozen=True)
class Ended:
    """The remains of a run: itself, its summary, and what the driver would make of what it told."""

    run: Any
    summary: dict[str, Any]
    events: list[dict[str, Any]]
    result: TrainResult

    @property
    def adapter(self) -> dict[str, np.ndarray]:
        """As the driver is given it."""
        spec = self.run.spec
        made = AdapterSpec(spec.model.base, spec.model.lora, self.summary["shapes"], spec.num_workers)
        return spec.channel.coordinator.adapter(made, self.summary.get("checkpoint"))


def train(spec: RunSpec, **hooks: Any) -> Ended:
    """The workers' loop to its end, here. Raises what it raises.

    Args:
        hooks: of `loops.loop_with`.
    """
    # Every process has a spec of its own, and Keras makes objects of what an optimizer's configuration holds.
    spec = dataclasses.replace(carried(dataclasses.replace(spec, channel=None)), channel=spec.channel)
    kept, begun = [], hooks.pop("begun", lambda run: None)

    def keep(run):
        kept.append(run)
        begun(run)

    try:
        summary = loop_with(begun=keep, **hooks)({"spec": spec, "started": time.monotonic()})
    finally:
        for run in kept:
            # A process that fails ends; this one goes on.
            run.log.heart.stop()
        spec.channel.coordinator.stop_watching()
    events = spec.channel.coordinator.events(0)
    return Ended(kept[0], summary, events, result_of(events, spec.directory, summary))
