"""The loop that runs in each Ray Train actor, one per host; all ranks run the same program in step.

Each other concern of a run has its own module: its start (`start`) and end (`leaving`), its data, evaluation,
checkpoints (`checkpointing`), adapters exported on the way (`snapshots`), votes and losses that are not finite
(`votes`), callbacks (`callback_runner`), and events (`event_log`). This module puts them together and calls them in an
order that is the same on every rank.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax

from kithara_ray.callbacks import RunInfo
from kithara_ray.callbacks.profiler import Tracer
from kithara_ray.errors import TrainingError
from kithara_ray.orchestration.cluster.process_setup import check_process_group
from kithara_ray.orchestration.worker import entry, leaving, start
from kithara_ray.orchestration.worker.callback_runner import Calls
from kithara_ray.orchestration.worker.channel import AdapterSpec
from kithara_ray.orchestration.worker.checkpointing import Saving
from kithara_ray.orchestration.worker.evaluation import Evaluation
from kithara_ray.orchestration.worker.event_log import EventLog
from kithara_ray.orchestration.worker.snapshots import SnapshotSender
from kithara_ray.orchestration.worker.spec import RunSpec
from kithara_ray.orchestration.worker.throughput import Figures, Window, numbers_of
from kithara_ray.orchestration.worker.votes import GO_ON, LOOK_BEHIND, PREEMPTED, SAVE, STOP, Outcomes
from kithara_ray.sharding.agree import Ballot, agree

logger = logging.getLogger(__name__)


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Run a worker's loop, see `worker.entry`. Rank 0 returns the run's summary."""
    return carry_out(Run(config["spec"], config["started"]))


def carry_out(run: "Run") -> dict[str, Any]:
    """Carry a run out to its end; return its summary."""
    try:
        run.build()
        run.train()
        return run.finish()
    except Exception as error:
        run.calls.end(run.number, "failed", f"{type(error).__name__}: {error}")
        raise


class Run:
    """One rank's run, from an empty process to the adapter sent to the head.

    Attributes:
        spec: the driver's decisions.
        rank: rank of this process.
        number: number of steps in the state.
        total_steps: number of steps of the whole run.
        log: events, phases and signs of life.
        calls, tracer: callbacks and the profiler of rank 0; other ranks have empty ones.
        saving, snapshots, evaluation: None if the run has none.
        left: the reason for leaving the run before its end; None if it was not left.

    From `build` on: base, mesh, model, optimizer, data (the training batches), state, frozen and step, see
    `kithara_ray.train.step`. A run that ended earlier has no step.

    Args:
        started: the time at which the process began with this run, by `time.monotonic`.
    """

    def __init__(self, spec: RunSpec, started: float):
        self.spec, self.rank = spec, jax.process_index()
        importing = time.monotonic() - started
        # These compare two hosts' clocks.
        phases = {
            **spec.start.phases,
            "schedule": round(max(0.0, time.time() - importing - spec.start.submitted), 2),
            "import": round(importing, 2),
        }
        self._beside = {**spec.start.beside, **entry.times_beside(spec.start.began)}
        check_process_group(spec.num_workers, spec.platform, spec.num_devices)
        self.number, self.left = 0, None
        self.saving: Saving | None = None
        self.snapshots: SnapshotSender | None = None
        self.evaluation: Evaluation | None = None
        self._saved_for_drain = False
        self.log = EventLog(self.rank, spec.channel, spec.limits, phases)
        self.calls = Calls(spec.callbacks if self.rank == 0 else (), lambda text: self.log.record("dropped", text=text))
        self.tracer = Tracer(spec.profiler if self.rank == 0 else None)
        self.log.record("begin")

    # --- the start ---------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Build model, data, arrays and compiled steps; a run that ended earlier gets no steps."""
        spec, log = self.spec, self.log
        parts = self._parts = start.open_parts(spec, log)
        self.base, self.mesh, self.model, self.optimizer = parts.base, parts.mesh, parts.model, parts.optimizer
        self.data, self.evaluation, self.total_steps = parts.data, parts.evaluation, parts.total_steps
        if spec.checkpointer is not None:
            with log.phase("look"):
                self._look_for_checkpoint()
        self._start_callbacks()
        with log.phase("load"):
            self.state, frozen = start.load_state(spec, parts, self.saving, self.is_finished)
        if self.is_finished:
            return
        assert frozen is not None
        self.frozen = frozen
        with log.phase("compare"):
            self.model.check_copies(self.state["params"], self.frozen)
        self._next_batch, self._next_tokens = self.data.batch(self.number)
        with log.phase("compile"):
            self.step = start.compile_steps(spec, parts, self.state, self.frozen)
            self.outcomes = self._outcomes()
        if spec.snapshots is not None:
            self.snapshots = SnapshotSender(spec.snapshots, spec.channel, self.rank, self._adapter_spec)
        log.record("started", total_steps=self.total_steps, **self._counts, phases=log.phases, beside=self._beside)

    def _look_for_checkpoint(self) -> None:
        self.saving = start.find_checkpoint(self.spec, self.rank, self._parts)
        self.log.also = self.saving.note
        self.number = self.saving.step
        if self.saving.resumed:
            found = {"checkpoint": self.saving.resumed, "notes": self.saving.notes}
            self.log.record("resumed", step=self.number, **found, events=list(self.saving.events))

    def _outcomes(self) -> Outcomes:
        return Outcomes(
            Ballot(self.mesh),
            self.spec.step.on_nan,
            rows_of=lambda number: self.data.source_rows(number - 1),
            on_skip=lambda number, rows: self.log.record("skipped", step=number, rows=rows),
        )

    @property
    def is_finished(self) -> bool:
        """True if the run ended in an earlier attempt, and was given no more steps since."""
        stopped = self.saving is not None and self.saving.finished in ("early_stopping", "callback")
        return self.number >= self.total_steps or stopped

    @property
    def _counts(self) -> dict[str, int]:
        return {"parameters": self.model.num_parameters, "trainable": self.model.num_trained}

    @property
    def _adapter_spec(self) -> AdapterSpec:
        how = self.spec.model
        assert how.lora is not None
        return AdapterSpec(how.base, how.lora, self.model.adapter_shapes, self.spec.num_workers)

    def _start_callbacks(self) -> None:
        """Start the callbacks. If one raises, all ranks raise TrainingError."""
        spec, counts = self.spec, self._counts
        name = spec.directory.rstrip("/").rpartition("/")[2]
        info = RunInfo(
            name,
            spec.directory,
            self.number,
            self.total_steps,
            parameters=counts["parameters"],
            trainable=counts["trainable"],
            settings=spec.settings,
        )
        self.figures = Figures(self.model.num_active, spec.model.lora is not None, self.mesh.size)
        problem = agree(self.calls.start(info))[0]
        if problem:
            raise TrainingError(problem)

    # --- the steps ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run all steps. Only logged steps wait for the device. The next batch is placed while a step runs."""
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
                self._save_if_due(self.saving, evaluated)
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
        """Start step `number` and place the next batch; return the step's metrics, which may still be computing."""
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
        """Add a row to the history; this waits for the step."""
        values = numbers_of(metrics, self.model.mixture_blocks)
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
        """Evaluate if an evaluation is due; return True if it was."""
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
        assert self.evaluation is not None
        alive = lambda: self.log.heart.at("eval", self.number)  # noqa: E731
        return self.evaluation.run(self.state["params"], self.frozen, alive)

    def _save_if_due(self, saving: Saving, evaluated: bool) -> None:
        saving.saver.check()
        stops = evaluated and not self._is_last and saving.has_stopped_improving()
        if not (self._is_last or stops or saving.is_due(self.number, evaluated)):
            return
        # A save must be sound: none of its steps may turn out to be not finite.
        self.outcomes.look(self.number, take_votes=False)
        with self.window.paused():
            self.log.heart.at("save", self.number)
            finished = "early_stopping" if stops else "steps" if self._is_last else None
            saving.save(self.number, self.state, finished=finished)
            self.log.heart.at("step", self.number)

    # --- leaving -----------------------------------------------------------------------------------------------------

    def _vote(self) -> int:
        """Return this rank's vote on the requests since the last step."""
        drains = self.spec.channel.is_draining() and not self._saved_for_drain
        return leaving.own_vote(self.log.heart.asked, self.calls.vote, drains)

    def _heed(self, vote: int) -> None:
        """Save on all ranks at this step, and leave. If Ray drains a node, the ranks go on until Ray ends the group,
        which then restarts under `max_preemption_failures`.

        Raises:
            TrainingError: the run was preempted. The failure policy decides on a restart.
        """
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
            raise leaving.preempted(self.rank, saved)
        self.left = leaving.REASONS[vote]

    def finish(self) -> dict[str, Any]:
        """Send this rank's part of the adapter, or of the weights; return the run's summary."""
        self.log.heart.at("save", self.number)
        self.data.close()
        if self.saving is not None and self.number == self.saving.step:
            # Nothing was trained. The checkpoint there may come from a run with another number of steps.
            self.saving.save(self.number, self.state, finished=self.saving.finished or "steps")
        leaving.hand_over(self.spec, self.rank, self.base, self.model, self.state["params"])
        stopped = self.left or (self.saving.finished if self.saving is not None else None) or "steps"
        self._tell_checkpoints()
        problem = self.calls.problem
        self._tell(self.calls.end, self.number, "failed" if problem else stopped, problem)
        times = {"input_wait_s": self.window.total_input_wait_s, "training_s": self._training_s}
        # This sends all events, because a restarted head has lost them.
        self.log.record("finished", **times, events=list(self.log.events))
        summary = {"shapes": self.model.adapter_shapes, "stopped": stopped, "callback_error": self.calls.problem}
        if self.saving is not None:
            summary |= {"checkpoint": self.saving.newest, "best_checkpoint": self.saving.best}
        self.log.heart.stop()
        return summary

    # --- callbacks ---------------------------------------------------------------------------------------------------

    def _tell(self, call: Callable, number: int, *arguments: Any) -> None:
        """Call rank 0's callbacks; if one does not return, the watchdog reports it."""
        if self.rank == 0:
            self.log.heart.at("callback", self.number)
            call(number, *arguments)
            self.log.heart.at("step", self.number)

    def _tell_checkpoints(self) -> None:
        while self.saving is not None and self.saving.committed:
            self._tell(self.calls.checkpoint, *self.saving.committed.popleft())
