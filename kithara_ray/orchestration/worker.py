"""The loop that runs in each Ray Train actor, one per host; all ranks run the same program in step."""

import dataclasses
import logging
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.train.v2._internal.execution.context import get_train_context

from kithara_ray.callbacks import Callback, Profiler, RunInfo
from kithara_ray.callbacks.profiler import Tracer
from kithara_ray.errors import TrainingError
from kithara_ray.hf.adapter import LoraConfig
from kithara_ray.orchestration.backend import terminated
from kithara_ray.orchestration.calling import Calls
from kithara_ray.orchestration.checkpointer import Checkpointer
from kithara_ray.orchestration.endless import WINDOW_ROWS, EndlessOrder, EndlessStore, EndlessStream
from kithara_ray.orchestration.figures import Figures
from kithara_ray.orchestration.outcomes import FAILED, GO_ON, INTERRUPT, LOOK_BEHIND, PREEMPTED, SAVE, STOP, Outcomes
from kithara_ray.orchestration.snapshots import Snapshots, SnapshotSender
from kithara_ray.orchestration.stream import HostStream, TokenStore
from kithara_ray.orchestration.watchdog import Beat, Heart, Limits
from kithara_ray.sft.order import BatchOrder, PackedOrder
from kithara_ray.sharding.shape import MeshShape

logger = logging.getLogger(__name__)

# Batches that are made while steps run.
_AHEAD = 2
_FETCH_REPORT_S = 2.0


@dataclass(frozen=True)
class DataSpec:
    """One tokenised dataset and how it is cut into batches.

    Attributes:
        rows_per_device: of one step, all its micro-batches together.
        packed_len: tokens of a row into which several samples are packed; None packs nothing.
        buckets: without packing, to how many lengths batches may be padded; each is a program to compile.
        shuffle_rows: see `kithara_ray.sft.order`.
    """

    store: TokenStore | EndlessStore
    rows_per_device: int
    packed_len: int | None
    buckets: int
    shuffle: bool
    shuffle_rows: int | None
    seed: int


@dataclass(frozen=True)
class RunSpec:
    """Everything a worker needs, as the driver decided it.

    Attributes:
        base: handle or directory of the base checkpoint, or of weights that were trained before.
        lora: what is adapted; None trains all weights.
        adapter: tensors to go on from; None starts from PEFT's initial factors.
        optimizer: ("keras", config) or ("optax", transformation).
        steps, epochs: one of them is None.
        platform: what JAX must run on, e.g. "tpu" or "cpu"; a silent fall-back is an error.
        micro_batches: parts of a step's rows that go through the model one after the other.
        num_workers: processes that must have met.
        num_devices: that they must have together; None where only the accelerator knows.
        directory: the run's.
        checkpointer: where the run is saved and goes on from; None saves nothing.
        on_nan: "stop" or "skip", for a step whose loss or gradient is not finite.
        limits: seconds without progress that end the run.
        snapshots: adapters written while it goes on; None writes none.
        callbacks: told on rank 0 what happens.
        profiler: which steps are traced on rank 0; None traces none.
        settings: the run's arguments as run.json has them, for callbacks.
        plan: what was planned for the slice; None without a plan.
        called, submitted: when the driver began, and when it asked for the workers, in seconds since the epoch.
    """

    base: str
    lora: LoraConfig | None
    precision: str
    quantize: str | None
    adapter: Mapping[str, np.ndarray] | None
    optimizer: tuple[str, Any]
    train: DataSpec
    eval: DataSpec | None
    steps: int | None
    epochs: int | None
    log_steps_interval: int
    eval_steps_interval: int | None
    eval_epochs_interval: int | None
    max_eval_samples: int | None
    mesh: MeshShape | None
    remat: str
    micro_batches: int
    seed: int
    platform: str
    num_workers: int
    num_devices: int | None
    directory: str
    checkpointer: Checkpointer | None
    on_nan: str
    limits: Limits
    snapshots: Snapshots | None
    callbacks: Sequence[Callback]
    profiler: Profiler | None
    settings: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    called: float
    submitted: float
    coordinator: ray.actor.ActorHandle = field(repr=False, compare=False)


def train_loop(config: dict[str, RunSpec]) -> dict[str, Any]:
    """Ray Train's `train_loop_per_worker`. What rank 0 returns is the run's summary."""
    spec = config["spec"]
    from kithara_ray.model import runtime

    started = time.monotonic()
    runtime.prepare()
    runtime.keep_compiled(spec.platform)
    run = Run(spec, started)
    try:
        run.build()
        run.train()
        return run.finish()
    except Exception as error:
        run.calls.end(run.number, "failed", f"{type(error).__name__}: {error}")
        raise


class Run:
    """One rank's run, from an empty process to the adapter sent to the coordinator.

    `number` is how many steps the state has seen.
    """

    def __init__(self, spec: RunSpec, started: float):
        import jax

        from kithara_ray.orchestration import preflight

        self.spec = spec
        self.rank = jax.process_index()
        importing = time.monotonic() - started
        self.phases = {
            "tokenize": round(spec.submitted - spec.called, 2),
            # By two hosts' clocks.
            "schedule": round(max(0.0, time.time() - importing - spec.submitted), 2),
            "import": round(importing, 2),
        }
        preflight.check_process_group(spec.num_workers, spec.platform, spec.num_devices)
        self._input_wait_s = self._total_input_wait_s = self._fetch_reported = 0.0
        self.number, self.saving, self.snapshots, self.left = 0, None, None, None
        self.calls = Calls(spec.callbacks if self.rank == 0 else (), lambda text: self._record("dropped", text=text))
        self.tracer = Tracer(spec.profiler if self.rank == 0 else None)
        self._saved_for_drain = False
        self.events: list[dict[str, Any]] = []
        self.heart = Heart(self.rank, spec.limits, self._send_beat)
        self._record("begin")

    def build(self) -> None:
        """Model, arrays, data and compiled steps."""
        from kithara_ray.hf import storage
        from kithara_ray.hf.checkpoint import BaseCheckpoint
        from kithara_ray.model.causal_lm import build
        from kithara_ray.sharding.agree import Ballot
        from kithara_ray.sharding.mesh import make_mesh
        from kithara_ray.train import step
        from kithara_ray.train.optimizer import is_elementwise

        spec = self.spec
        with self._phase("fetch"):
            self.base = base = BaseCheckpoint.open(storage.fetch(spec.base, self._report_fetch))
        with self._phase("build"):
            self.mesh = make_mesh(spec.mesh)
            self.model = build(
                base.config,
                spec.lora,
                self.mesh,
                spec.precision,
                remat=spec.remat,
                stack_factors=is_elementwise(*spec.optimizer),
                quantize=spec.quantize,
                train_weights=spec.lora is None,
            )
            self.optimizer = self._make_optimizer()
        self.data = self._stream(spec.train)
        self.eval_data = self._stream(spec.eval) if spec.eval else None
        self.total_steps = spec.steps if spec.steps is not None else self.data.order.total_steps(spec.epochs)
        if spec.checkpointer is not None:
            with self._phase("look"):
                self._look_for_checkpoint(base)
        self._start_callbacks()
        with self._phase("load"):
            if spec.lora is None:
                # A run that has ended needs them too: a checkpoint is read into their place.
                params, self.frozen = self.model.as_params(self.model.load(base)), []
            else:
                self.frozen = None if self.is_finished else self.model.load(base)
                if spec.adapter is None:
                    params = self.model.initial_factors(spec.seed, self.frozen)
                else:
                    params = self.model.place_factors(spec.adapter)
            self.state = step.initial_state(self.model, self.optimizer, params)
            if self.saving is not None:
                self.state = self.saving.restore(self.state)
            if self.is_finished:
                return
        with self._phase("compare"):
            self.model.check_copies(self.state["params"], self.frozen)
        self._next_batch, self._next_tokens = self.data.batch(self.number)
        with self._phase("compile"):
            # The largest first: if one does not fit, it is that.
            self.step = ByLength(
                (
                    step.compile_step(
                        self.model,
                        self.optimizer,
                        self.state,
                        self.frozen,
                        shape,
                        spec.micro_batches,
                        spec.seed,
                        skip_nonfinite=spec.on_nan == "skip",
                    )
                    for shape in self._batch_shapes(self.data)
                ),
                self.data.shapes,
            )
            self.outcomes = Outcomes(
                Ballot(self.mesh),
                spec.on_nan,
                rows_of=lambda number: self.data.source_rows(number - 1),
                on_skip=lambda number, rows: self._record("skipped", step=number, rows=rows),
            )
            if self.eval_data:
                self.evaluate_step = ByLength(
                    (
                        step.compile_eval(self.model, self.state["params"], self.frozen, shape)
                        for shape in self._batch_shapes(self.eval_data)
                    ),
                    self.eval_data.shapes,
                )
        if spec.snapshots is not None:
            about = {"num_ranks": spec.num_workers, "shapes": self.model.adapter_shapes}
            about |= {"config": spec.lora, "base": spec.base}
            self.snapshots = SnapshotSender(spec.snapshots, spec.coordinator, self.rank, about)
        self._record("started", total_steps=self.total_steps, **self._counts(), phases=self.phases)

    @property
    def is_finished(self) -> bool:
        """A run that ended is not trained again; one that is given more steps goes on."""
        stopped = self.saving is not None and self.saving.finished in ("early_stopping", "callback")
        return self.number >= self.total_steps or stopped

    def _counts(self) -> dict[str, int]:
        """Of parameters: those of the model with its adapter, and those of them that are trained."""
        base = sum(math.prod(slot.shape) for slot in self.model.slots)
        if self.spec.lora is None:
            return {"parameters": base, "trainable": base}
        adapter = sum(math.prod(shape) for shape in self.model.adapter_shapes.values())
        return {"parameters": base + adapter, "trainable": adapter}

    def _start_callbacks(self) -> None:
        """Raises TrainingError, on all ranks, what a callback cannot start with."""
        from kithara_ray.sharding.agree import agree

        spec, counts = self.spec, self._counts()
        name = spec.directory.rstrip("/").rpartition("/")[2]
        info = RunInfo(name, spec.directory, self.number, self.total_steps, **counts, settings=spec.settings)
        self.figures = Figures(counts["parameters"], spec.lora is not None, self.mesh.size)
        problem = agree(self.calls.start(info))[0]
        if problem:
            raise TrainingError(problem)

    def _look_for_checkpoint(self, base) -> None:
        from kithara_ray.orchestration.saving import Saving, optimizer_identity, sequence_identity

        spec = self.spec
        tensors = {f"params/{slot.key}": slot.names for slot in self.model.factor_slots}
        self.saving = Saving(spec.checkpointer, self.rank, spec.num_workers, tensors, spec.base)
        self.saving.look(
            lambda: {
                "base": base.fingerprint(),
                "precision": spec.precision,
                "quantize": spec.quantize,
                "lora": spec.lora and dataclasses.asdict(spec.lora),
                "optimizer": optimizer_identity(*spec.optimizer),
                "seed": spec.seed,
                "data": sequence_identity(self.data.order, spec.train.store.content, spec.train.packed_len),
            }
        )
        self.number = self.saving.step
        if self.number > self.total_steps:
            logger.warning("the run has %d steps already, %d are asked for", self.number, self.total_steps)
        if self.saving.resumed:
            self._record(
                "resumed",
                step=self.number,
                checkpoint=self.saving.resumed,
                notes=self.saving.notes,
                events=list(self.saving.events),
            )

    def train(self) -> None:
        """All steps. Nothing waits for the device between logged steps; the next batch is placed while a step runs."""
        last_logged, window_tokens, mark = self.number, 0, time.monotonic()
        began, before = mark, self.number
        while not self.is_finished and not self.left:
            self.number += 1
            number = self.number
            self.heart.at("step", number)
            batch, tokens = self._next_batch, self._next_tokens
            self.tracer.before(number, self.state)
            self.state, metrics = self.step(self.state, self.frozen, batch)
            self.tracer.after(number, self.state)
            self.outcomes.cast(number, self._vote(), metrics)
            window_tokens += tokens
            if number < self.total_steps:
                waited = time.monotonic()
                self.heart.at("data", number + 1)
                self._next_batch, self._next_tokens = self.data.batch(number)
                self._input_wait_s += time.monotonic() - waited
                self.heart.at("step", number)
            if number == before + 1:
                float(metrics["loss"])
                self._record("first_step", seconds=round(time.monotonic() - began, 2))
            vote = self.outcomes.look(number - LOOK_BEHIND)
            due = number % self.spec.log_steps_interval == 0 or number == self.total_steps
            evaluate = self.eval_data and (number == self.total_steps or self._is_evaluated(number))
            if due:
                values = {name: float(value) for name, value in metrics.items()}
                self.outcomes.look(number, take_votes=False)
                now = time.monotonic()
                self._log(number, values, window_tokens, now - mark, number - last_logged)
                last_logged, window_tokens, mark = number, 0, now
            if evaluate:
                evaluation = self.evaluate()
                self._record("eval", step=number, **evaluation)
                self._tell(self.calls.evaluation, number, evaluation)
                mark = time.monotonic()
            if self.saving is not None and self._save(number, bool(evaluate)):
                mark = time.monotonic()
            self._tell_checkpoints()
            if self.snapshots is not None:
                self.snapshots.after(number, lambda: self.model.adapter_shards(self.state["params"], self.rank))
            if vote > (SAVE if self._saved_for_drain else GO_ON) and not self.is_finished:
                self._heed(vote)
        if self.snapshots is not None:
            self.snapshots.wait()
        self.tracer.finish(self.state)
        self._training_s = time.monotonic() - began

    def _vote(self) -> int:
        """What this rank has been asked for since the last step."""
        if terminated.is_set():
            return PREEMPTED
        if self.heart.asked == "interrupt":
            return INTERRUPT
        drain = SAVE if _is_draining() and not self._saved_for_drain else GO_ON
        return max(self.calls.vote, drain)

    def _heed(self, vote: int) -> None:
        """All ranks save at this step, and leave; of a node that Ray drains they go on until Ray ends the group, which
        then starts again by `max_preemption_failures`.

        Raises:
            TrainingError: preempted; whether the run then starts again is the failure policy's.
        """
        from kithara_ray.sharding.agree import agree

        saved = "nothing was saved: give Trainer(checkpointer=...)"
        if self.saving is not None:
            self.heart.at("save", self.number)
            self.saving.save(self.number, self.state, finished="callback" if vote == STOP else None)
            self.saving.settle()
            saved = f"step {self.number} is saved"
        if vote == SAVE:
            self._saved_for_drain = True
            return
        if vote == PREEMPTED:
            told = agree(f"rank {self.rank} on {socket.gethostname()} got SIGTERM" if terminated.is_set() else "")
            raise TrainingError(f"preempted: {', '.join(text for text in told if text)}; {saved}")
        self.left = {STOP: "callback", FAILED: "callback_error", INTERRUPT: "interrupt"}[vote]

    def _save(self, number: int, evaluated: bool) -> bool:
        """Save if it is time to; returns whether time went by."""
        self.saving.saver.check()
        is_last = number == self.total_steps
        stops = evaluated and not is_last and self.saving.has_stopped_improving()
        if not (is_last or stops or self.saving.is_due(number, evaluated)):
            return False
        # What is saved must be whole: no step of it may turn out to be not finite.
        self.outcomes.look(number, take_votes=False)
        self.heart.at("save", number)
        self.saving.save(number, self.state, finished="early_stopping" if stops else "steps" if is_last else None)
        self.heart.at("step", number)
        return True

    def _is_evaluated(self, number: int) -> bool:
        """Whether an evaluation is due after `number` steps, by its interval of steps or of epochs."""
        spec = self.spec
        if spec.eval_steps_interval:
            return number % spec.eval_steps_interval == 0
        epoch, index = self.data.order.locate(number)
        return index == 0 and bool(spec.eval_epochs_interval) and epoch % spec.eval_epochs_interval == 0

    def evaluate(self) -> dict[str, float]:
        """Token-weighted loss and perplexity over the whole evaluation set, or its first `max_eval_samples` rows."""
        order = self.eval_data.order
        total = weight = 0.0
        for step in range(order.steps_of(0)):
            batch, _ = self.eval_data.batch(step)
            self.heart.at("eval", self.number)
            loss, tokens = self.evaluate_step(self.state["params"], self.frozen, batch)
            total, weight = total + float(loss), weight + float(tokens)
        loss = total / max(weight, 1.0)
        return {"eval_loss": loss, "eval_perplexity": float(np.exp(loss)), "eval_tokens": weight}

    def finish(self) -> dict[str, Any]:
        """Send this rank's part of the adapter, or of the weights."""
        import jax

        self.heart.at("save", self.number)
        self.data.close()
        if self.saving is not None and self.number == self.saving.step:
            # Nothing was trained; what is there may be of a run that was to be longer or shorter.
            self.saving.save(self.number, self.state, finished=self.saving.finished or "steps")
        params, coordinator = self.state["params"], self.spec.coordinator
        if self.spec.lora is None:
            from kithara_ray.orchestration.handover import send_weights

            send_weights(coordinator, self.spec.base, self.base, self.model, params, self.rank, self.spec.directory)
        else:
            ray.get(coordinator.put_shards.remote(self.rank, self.model.adapter_shards(params, self.rank)))
        stopped = self.left or (self.saving.finished if self.saving is not None else None) or "steps"
        self._tell_checkpoints()
        problem = self.calls.problem
        self._tell(self.calls.end, self.number, "failed" if problem else stopped, problem)
        times = {"input_wait_s": self._total_input_wait_s, "training_s": self._training_s}
        # With all events: a coordinator that was started again has lost them.
        self._record("finished", **times, events=list(self.events))
        summary = {"shapes": self.model.adapter_shapes, "stopped": stopped, "callback_error": self.calls.problem}
        if self.saving is not None:
            summary |= {"checkpoint": self.saving.newest, "best_checkpoint": self.saving.best}
        self.heart.stop()
        jax.distributed.shutdown()
        return summary

    def _make_optimizer(self):
        from kithara_ray.train.optimizer import KerasOptimizer, OptaxOptimizer

        kind, value = self.spec.optimizer
        return KerasOptimizer(value) if kind == "keras" else OptaxOptimizer(value)

    def _stream(self, data: DataSpec) -> HostStream | EndlessStream:
        from kithara_ray.sharding.mesh import batch_sharding

        rows = data.rows_per_device * self.mesh.size
        is_eval = data is self.spec.eval
        if isinstance(data.store, EndlessStore):
            shapes = data.store.shapes(self.spec.platform, data.packed_len, data.buckets)
            order = EndlessOrder(rows, data.seed, data.shuffle, data.shuffle_rows or WINDOW_ROWS)
            packed = data.packed_len is not None
            return EndlessStream(data.store, order, shapes, batch_sharding(self.mesh), packed, _AHEAD)
        limit = self.spec.max_eval_samples if is_eval else None
        store = data.store.head(limit) if limit else data.store
        shapes = store.shapes(self.spec.platform, data.packed_len, data.buckets)
        common = {"batch_rows": rows, "seed": data.seed, "shuffle": data.shuffle, "shuffle_rows": data.shuffle_rows}
        common["parts"] = () if is_eval else store.parts
        if data.packed_len is None:
            order = BatchOrder(size=store.num_rows, lengths=store.lengths if len(shapes) > 1 else None, **common)
        else:
            room = {"seq_len": shapes[0][0], "predictions": shapes[0][1]}
            order = PackedOrder(lengths=store.lengths, trained=store.trained, **room, **common)
        return HostStream(store, order, shapes, batch_sharding(self.mesh), ahead=0 if is_eval else _AHEAD)

    def _batch_shapes(self, data: HostStream):
        """Of the batches that may come, the largest first."""
        from kithara_ray.train.step import abstract_batch

        return (abstract_batch(self.model, data.order.batch_rows, *shape) for shape in reversed(data.shapes))

    def _log(self, step: int, values: dict[str, float], tokens: int, seconds: float, steps: int) -> None:
        row = {
            "step": step,
            **values,
            "tokens_per_s": tokens / seconds,
            "step_time_s": seconds / steps,
            "input_wait_s": self._input_wait_s / steps,
            "epoch": self._epoch_after(step),
            **self.figures.of(tokens / seconds),
        }
        self._total_input_wait_s += self._input_wait_s
        self._input_wait_s = 0.0
        self._record("step", **row)
        if self.rank == 0:
            logger.info("step=%d loss=%.4f tokens_per_s=%.0f", step, values["loss"], row["tokens_per_s"])
        self._tell(self.calls.step, step, row)

    def _tell(self, call: Callable, number: int, *arguments: Any) -> None:
        """Rank 0's callbacks; where one does not come back, the watchdog says so."""
        if self.rank == 0:
            self.heart.at("callback", self.number)
            call(number, *arguments)
            self.heart.at("step", self.number)

    def _tell_checkpoints(self) -> None:
        while self.saving is not None and self.saving.committed:
            self._tell(self.calls.checkpoint, *self.saving.committed.popleft())

    def _epoch_after(self, steps: int) -> float:
        epoch, index = self.data.order.locate(steps)
        return epoch + index / self.data.order.steps_of(epoch)

    def _record(self, kind: str, **values: Any) -> None:
        event = {"kind": kind, **values}
        if self.saving is not None:
            self.saving.note(event)
        if self.rank == 0:
            if kind == "resumed":
                self.events = list(values["events"])
            elif kind != "finished":
                self.events.append(event)
            reference = self.spec.coordinator.record.remote(event)
            if kind == "finished":
                ray.get(reference)

    def _send_beat(self, beat: Beat, limits: Limits) -> str | None:
        return ray.get(self.spec.coordinator.beat.remote(beat, limits), timeout=10)

    def _report_fetch(self, here: int, total: int) -> None:
        """Now and then, how much of the base has been fetched onto rank 0's host."""
        now = time.monotonic()
        if now - self._fetch_reported >= _FETCH_REPORT_S or here == total:
            self._fetch_reported = now
            self.heart.at("fetch")
            self._record("fetch", here=here, total=total)

    def _phase(self, name: str):
        return _Phase(self, name)


def _is_draining() -> bool:
    """Whether Ray has been told that the node of one of the ranks will go.

    `ray.train.get_preemption_info()` is a barrier of all ranks, by way of an actor; what this process knows is enough.
    """
    return get_train_context().preemption_context.preemption_info is not None


class ByLength:
    """One program for each length that batches are padded to.

    Args:
        programs: compiled for batches of these shapes, the largest first.
        shapes: (T, K), ascending.
    """

    def __init__(self, programs: Iterable[Callable], shapes: tuple[tuple[int, int], ...]):
        self._programs = dict(zip((length for length, _ in reversed(shapes)), programs, strict=True))

    def __call__(self, state, frozen, batch):
        return self._programs[batch["token_ids"].shape[1]](state, frozen, batch)


class _Phase:
    """Times one phase of start-up and tells the driver that it has begun."""

    def __init__(self, run: Run, name: str):
        self.run, self.name = run, name

    def __enter__(self):
        self.run._record("phase", name=self.name)
        self.run.heart.at(self.name)
        self.started = time.monotonic()

    def __exit__(self, *exc):
        self.run.phases[self.name] = round(time.monotonic() - self.started, 2)
