"""The loop that runs in each Ray Train actor, one per host; all ranks run the same program in step.

What belongs to a run has a module of its own: its data (`feed`), evaluation, checkpoints (`saving`), adapters on the
way (`snapshots`), votes and losses that are not finite (`outcomes`), callbacks (`calling`), what it tells (`events`).
Here they are put together, and told what happens, in an order that is the same on every rank.
"""

import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import ray

from kithara_ray.callbacks import RunInfo
from kithara_ray.callbacks.profiler import Tracer
from kithara_ray.errors import TrainingError
from kithara_ray.orchestration.cluster.process_setup import is_draining, terminated
from kithara_ray.orchestration.worker.callback_runner import Calls
from kithara_ray.orchestration.worker.event_log import EventLog
from kithara_ray.orchestration.worker.snapshots import SnapshotSender
from kithara_ray.orchestration.worker.spec import RunSpec
from kithara_ray.orchestration.worker.throughput import Figures, Window
from kithara_ray.orchestration.worker.votes import (
    FAILED,
    GO_ON,
    INTERRUPT,
    LOOK_BEHIND,
    PREEMPTED,
    SAVE,
    STOP,
    Outcomes,
)

logger = logging.getLogger(__name__)


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

    Attributes:
        spec: what the driver decided.
        rank: of this process.
        number: how many steps the state has seen.
        total_steps: how many there will be.
        log: events, phases and signs of life.
        calls, tracer: callbacks and the profiler, which are rank 0's; other ranks have empty ones.
        saving, snapshots, evaluation: None where the run has none.
        left: why the run was left before its end; None: it was not.

    From `build` on: base, mesh, model, optimizer, data (the training batches), state, frozen and step, as of
    `kithara_ray.train.step`; a run that has ended before has no step.

    Args:
        started: when the process began with this run, by `time.monotonic`.
    """

    def __init__(self, spec: RunSpec, started: float):
        from kithara_ray.orchestration.cluster import process_setup

        self.spec, self.rank = spec, jax.process_index()
        importing = time.monotonic() - started
        phases = {
            "tokenize": round(spec.submitted - spec.called, 2),
            # By two hosts' clocks.
            "schedule": round(max(0.0, time.time() - importing - spec.submitted), 2),
            "import": round(importing, 2),
        }
        process_setup.check_process_group(spec.num_workers, spec.platform, spec.num_devices)
        self.number, self.left = 0, None
        self.saving = self.snapshots = self.evaluation = None
        self._saved_for_drain = False
        self.log = EventLog(self.rank, spec.coordinator, spec.limits, phases)
        self.calls = Calls(spec.callbacks if self.rank == 0 else (), lambda text: self.log.record("dropped", text=text))
        self.tracer = Tracer(spec.profiler if self.rank == 0 else None)
        self.log.record("begin")

    # --- the start ---------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Model, data, arrays and compiled steps. Of a run that has ended before, no steps."""
        spec, log = self.spec, self.log
        self._build_model()
        self._open_data()
        if spec.checkpointer is not None:
            with log.phase("look"):
                self._look_for_checkpoint()
        self._start_callbacks()
        with log.phase("load"):
            self._load_state()
        if self.is_finished:
            return
        with log.phase("compare"):
            self.model.check_copies(self.state["params"], self.frozen)
        self._next_batch, self._next_tokens = self.data.batch(self.number)
        with log.phase("compile"):
            self._compile()
        if spec.snapshots is not None:
            about = {"num_ranks": spec.num_workers, "shapes": self.model.adapter_shapes}
            about |= {"config": spec.model.lora, "base": spec.model.base}
            self.snapshots = SnapshotSender(spec.snapshots, spec.coordinator, self.rank, about)
        log.record("started", total_steps=self.total_steps, **self._counts, phases=log.phases)

    def _build_model(self) -> None:
        """Variables with shapes and no values, on a mesh of all ranks' devices."""
        from kithara_ray.hf.checkpoint import BaseCheckpoint
        from kithara_ray.hf.fetch import fetch
        from kithara_ray.model.causal_lm import build
        from kithara_ray.sharding.mesh import make_mesh
        from kithara_ray.train.optimizer import KerasOptimizer, OptaxOptimizer, is_elementwise

        model, step = self.spec.model, self.spec.step
        with self.log.phase("fetch"):
            self.base = BaseCheckpoint.open(fetch(model.base, self.log.fetched))
        with self.log.phase("build"):
            self.mesh = make_mesh(step.mesh)
            self.model = build(
                self.base.config,
                model.lora,
                self.mesh,
                model.precision,
                remat=step.remat,
                stack_factors=is_elementwise(*step.optimizer),
                quantize=model.quantize,
                train_weights=model.lora is None,
            )
            kind, value = step.optimizer
            self.optimizer = KerasOptimizer(value) if kind == "keras" else OptaxOptimizer(value)

    def _open_data(self) -> None:
        from kithara_ray.orchestration.data.loading import training_batches
        from kithara_ray.orchestration.worker.evaluation import Evaluation

        spec = self.spec
        self.data = training_batches(spec.train, self.mesh, spec.platform)
        if spec.eval is not None:
            self.evaluation = Evaluation(spec.eval, self.mesh, spec.platform)
        self.total_steps = spec.steps if spec.steps is not None else self.data.order.total_steps(spec.epochs)

    def _look_for_checkpoint(self) -> None:
        from kithara_ray.orchestration.worker.checkpointing import Saving, identity_of

        spec = self.spec
        tensors = {f"params/{slot.key}": slot.names for slot in self.model.factor_slots}
        self.saving = Saving(spec.checkpointer, self.rank, spec.num_workers, tensors, spec.model.base)
        self.saving.look(lambda: identity_of(spec, self.base, self.data.order))
        self.log.also = self.saving.note
        self.number = self.saving.step
        if self.number > self.total_steps:
            logger.warning("the run has %d steps already, %d are asked for", self.number, self.total_steps)
        if self.saving.resumed:
            found = {"checkpoint": self.saving.resumed, "notes": self.saving.notes}
            self.log.record("resumed", step=self.number, **found, events=list(self.saving.events))

    @property
    def is_finished(self) -> bool:
        """A run that ended is not trained again; one that is given more steps goes on."""
        stopped = self.saving is not None and self.saving.finished in ("early_stopping", "callback")
        return self.number >= self.total_steps or stopped

    @property
    def _counts(self) -> dict[str, int]:
        return {"parameters": self.model.num_parameters, "trainable": self.model.num_trained}

    def _start_callbacks(self) -> None:
        """Raises TrainingError, on all ranks, what a callback cannot start with."""
        from kithara_ray.sharding.agree import agree

        spec, counts = self.spec, self._counts
        name = spec.directory.rstrip("/").rpartition("/")[2]
        info = RunInfo(name, spec.directory, self.number, self.total_steps, **counts, settings=spec.settings)
        self.figures = Figures(counts["parameters"], spec.model.lora is not None, self.mesh.size)
        problem = agree(self.calls.start(info))[0]
        if problem:
            raise TrainingError(problem)

    def _load_state(self) -> None:
        """Weights and what is trained, each rank reading what its devices own; a checkpoint's in their place."""
        from kithara_ray.train.step import initial_state

        spec, model = self.spec, self.model
        if spec.model.lora is None:
            # A run that has ended needs them too: a checkpoint is read into their place.
            params, self.frozen = model.as_params(model.load(self.base)), []
        else:
            self.frozen = None if self.is_finished else model.load(self.base)
            if spec.model.adapter is None:
                params = model.initial_factors(spec.step.seed, self.frozen)
            else:
                params = model.place_factors(spec.model.adapter)
        self.state = initial_state(model, self.optimizer, params)
        if self.saving is not None:
            self.state = self.saving.restore(self.state)

    def _compile(self) -> None:
        """The step, and where there is one the evaluation, a program for each length of a batch."""
        from kithara_ray.sharding.agree import Ballot
        from kithara_ray.train.programs import ByLength
        from kithara_ray.train.step import compile_step

        how, skips = self.spec.step, self.spec.step.on_nan == "skip"

        def compiled(batch):
            given = (self.model, self.optimizer, self.state, self.frozen, batch)
            return compile_step(*given, how.micro_batches, how.seed, skip_nonfinite=skips)

        self.step = ByLength(compiled, self.model, self.data.order.batch_rows, self.data.shapes)
        self.outcomes = Outcomes(
            Ballot(self.mesh),
            how.on_nan,
            rows_of=lambda number: self.data.source_rows(number - 1),
            on_skip=lambda number, rows: self.log.record("skipped", step=number, rows=rows),
        )
        if self.evaluation is not None:
            self.evaluation.compile(self.model, self.state["params"], self.frozen)

    # --- the steps ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """All steps. Nothing waits for the device between logged steps; the next batch is placed while a step runs."""
        began, first = time.monotonic(), self.number + 1
        self.window = Window(self.number)
        while not self.is_finished and not self.left:
            self.number += 1
            metrics = self._start_step()
            if self.number == first:
                float(metrics["loss"])
                self.log.record("first_step", seconds=round(time.monotonic() - began, 2))
            vote = self.outcomes.look(self.number - LOOK_BEHIND)
            if self._is_last or self.number % self.spec.log_steps_interval == 0:
                self._log(metrics)
            evaluated = self._evaluate_if_due(metrics)
            if self.saving is not None:
                self._save_if_due(evaluated)
            self._tell_checkpoints()
            if self.snapshots is not None:
                self.snapshots.after(self.number, lambda: self.model.adapter_shards(self.state["params"], self.rank))
            if vote > (SAVE if self._saved_for_drain else GO_ON) and not self.is_finished:
                self._heed(vote)
        if self.snapshots is not None:
            self.snapshots.wait()
        self.tracer.finish(self.state)
        self._training_s = time.monotonic() - began

    @property
    def _is_last(self) -> bool:
        return self.number == self.total_steps

    def _start_step(self) -> dict[str, jax.Array]:
        """Step `number` is started and the next batch placed; the step's metrics, as they will be."""
        number, heart = self.number, self.log.heart
        heart.at("step", number)
        self.tracer.before(number, self.state)
        self.state, metrics = self.step(self.state, self.frozen, self._next_batch)
        self.tracer.after(number, self.state)
        self.outcomes.cast(number, self._vote(), metrics)
        self.window.add(self._next_tokens)
        if number < self.total_steps:
            heart.at("data", number + 1)
            with self.window.waiting():
                self._next_batch, self._next_tokens = self.data.batch(number)
            heart.at("step", number)
        return metrics

    def _log(self, metrics: dict[str, jax.Array]) -> None:
        """A row of the history; waits for the step."""
        values = {name: float(value) for name, value in metrics.items()}
        self.outcomes.look(self.number, take_votes=False)
        speed = self.window.close(self.number)
        epoch, index = self.data.order.locate(self.number)
        row = {"step": self.number, **values, **speed, "epoch": epoch + index / self.data.order.steps_of(epoch)}
        row |= self.figures.of(speed["tokens_per_s"])
        self.log.record("step", **row)
        if self.rank == 0:
            shown = (self.number, values["loss"], speed["tokens_per_s"])
            logger.info("step=%d loss=%.4f tokens_per_s=%.0f", *shown)
        self._tell(self.calls.step, self.number, row)

    def _evaluate_if_due(self, metrics: dict[str, jax.Array]) -> bool:
        """Whether it was."""
        if self.evaluation is None or not (self._is_last or self.evaluation.is_due(self.number, self.data.order)):
            return False
        jax.block_until_ready(metrics)
        with self.window.paused():
            values = self.evaluate()
            self.log.record("eval", step=self.number, **values)
            self._tell(self.calls.evaluation, self.number, values)
        return True

    def evaluate(self) -> dict[str, float]:
        """See `Evaluation.run`."""
        alive = lambda: self.log.heart.at("eval", self.number)  # noqa: E731
        return self.evaluation.run(self.state["params"], self.frozen, alive)

    def _save_if_due(self, evaluated: bool) -> None:
        self.saving.saver.check()
        stops = evaluated and not self._is_last and self.saving.has_stopped_improving()
        if not (self._is_last or stops or self.saving.is_due(self.number, evaluated)):
            return
        # What is saved must be whole: no step of it may turn out to be not finite.
        self.outcomes.look(self.number, take_votes=False)
        with self.window.paused():
            self.log.heart.at("save", self.number)
            self.saving.save(
                self.number, self.state, finished="early_stopping" if stops else "steps" if self._is_last else None
            )
            self.log.heart.at("step", self.number)

    # --- leaving -----------------------------------------------------------------------------------------------------

    def _vote(self) -> int:
        """What this rank has been asked for since the last step."""
        if terminated.is_set():
            return PREEMPTED
        if self.log.heart.asked == "interrupt":
            return INTERRUPT
        drain = SAVE if is_draining() and not self._saved_for_drain else GO_ON
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
            self.log.heart.at("save", self.number)
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

    def finish(self) -> dict[str, Any]:
        """Send this rank's part of the adapter, or of the weights; returns the run's summary."""
        self.log.heart.at("save", self.number)
        self.data.close()
        if self.saving is not None and self.number == self.saving.step:
            # Nothing was trained; what is there may be of a run that was to be longer or shorter.
            self.saving.save(self.number, self.state, finished=self.saving.finished or "steps")
        self._hand_over()
        stopped = self.left or (self.saving.finished if self.saving is not None else None) or "steps"
        self._tell_checkpoints()
        problem = self.calls.problem
        self._tell(self.calls.end, self.number, "failed" if problem else stopped, problem)
        times = {"input_wait_s": self.window.total_input_wait_s, "training_s": self._training_s}
        # With all events: a coordinator that was started again has lost them.
        self.log.record("finished", **times, events=list(self.log.events))
        summary = {"shapes": self.model.adapter_shapes, "stopped": stopped, "callback_error": self.calls.problem}
        if self.saving is not None:
            summary |= {"checkpoint": self.saving.newest, "best_checkpoint": self.saving.best}
        self.log.heart.stop()
        jax.distributed.shutdown()
        return summary

    def _hand_over(self) -> None:
        params, spec = self.state["params"], self.spec
        if spec.model.lora is None:
            from kithara_ray.orchestration.worker.weight_sender import send_weights

            base = spec.model.base
            send_weights(spec.coordinator, base, self.base, self.model, params, self.rank, spec.directory)
        else:
            ray.get(spec.coordinator.put_shards.remote(self.rank, self.model.adapter_shards(params, self.rank)))

    # --- callbacks ---------------------------------------------------------------------------------------------------

    def _tell(self, call: Callable, number: int, *arguments: Any) -> None:
        """Rank 0's callbacks; where one does not come back, the watchdog says so."""
        if self.rank == 0:
            self.log.heart.at("callback", self.number)
            call(number, *arguments)
            self.log.heart.at("step", self.number)

    def _tell_checkpoints(self) -> None:
        while self.saving is not None and self.saving.committed:
            self._tell(self.calls.checkpoint, *self.saving.committed.popleft())
