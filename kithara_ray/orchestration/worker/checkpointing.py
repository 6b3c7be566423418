"""One rank's view of a run's checkpoints: it finds the one to resume from, saves, and detects an early stop."""

import collections
import dataclasses
import hashlib
import json
import logging
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kithara_ray.checkpoint import disk_format, saver
from kithara_ray.checkpoint.checkpointer import Checkpointer
from kithara_ray.checkpoint.disk_format import Checkpoint
from kithara_ray.errors import ConfigError, TrainingError
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.orchestration.worker.spec import RunSpec
from kithara_ray.sharding.agree import agree
from kithara_ray.storage.places import Place

logger = logging.getLogger(__name__)

# Kinds of events that make up a run's history; the others describe one attempt's start and end.
HISTORY = ("step", "eval", "skipped")


@dataclass
class Saving:
    """The checkpoints of a `Run`; all ranks call its methods together.

    Attributes:
        settings: the run's Checkpointer.
        rank, num_ranks: rank of this process, and number of ranks.
        tensors: function from an array of the state to the adapter tensors that it is made of.
        base: handle of the base, for later exports of a checkpoint.
        step: number of steps in the state that the run begins with.
        finished: the reason why the run that was found has ended; None if it goes on.
        events: the history so far; rank 0's is written.
        evaluations: the evaluations so far, equal on every rank.
        notes: messages about damaged checkpoints that were skipped.
        committed: on rank 0, (step, URL) of each checkpoint when it becomes complete; a consumer takes them out.
    """

    settings: Checkpointer
    rank: int
    num_ranks: int
    tensors: Mapping[str, Sequence[str]]
    base: str | None = None
    step: int = 0
    finished: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        self.place = Place(self.settings.checkpoint_dir)
        attempt = agree(uuid.uuid4().hex[:8])[0]
        self.committed: collections.deque[tuple[int, str]] = collections.deque()
        self.saver = saver.Saver(
            self.place,
            attempt,
            self.rank,
            self.num_ranks,
            self.settings.keep,
            self.settings.save_timeout_s,
            on_commit=lambda url, seconds: self.committed.append((disk_format.step_of(url.rpartition("/")[2]), url)),
        )
        self._metrics: dict[str, float] = {}
        self._found: Checkpoint | None = None
        self._check_shared(attempt)

    def _check_shared(self, attempt: str) -> None:
        """Check that all hosts write to one place: equal directory names on separate disks would lose parts."""
        name = f"{saver.PROBE}{attempt}"
        problem = ""
        try:
            self.place.put_bytes(b"", name, f"{self.rank:05d}")
        except OSError as error:
            problem = str(error)
        problems = agree(problem)
        seen = agree(str(len(self.place.files(name))) if not any(problems) else "")
        hosts = agree(socket.gethostname())
        if self.rank == 0:
            self.place.remove(name, sorted(self.place.files(name)))
        for rank, text in enumerate(problems):
            if text:
                raise TrainingError(f"rank {rank} on {hosts[rank]} cannot save: {text}")
        for rank, count in enumerate(seen):
            if int(count) != self.num_ranks:
                raise ConfigError(
                    f"checkpoint_dir {self.settings.checkpoint_dir}: rank {rank} on {hosts[rank]} sees the files of "
                    f"{count} of {self.num_ranks} ranks there; give a directory that all hosts share, or gs://..."
                )

    # --- the start ---------------------------------------------------------------------------------------------------

    def look(self, identity: Callable[[], Mapping[str, Any]]) -> None:
        """Find the checkpoint to resume from, and the run's facts in it.

        Args:
            identity: returns the values that identify this run; called on rank 0 only.

        Raises:
            ConfigError: the checkpoints there belong to another run.
            CheckpointError: none of them is complete.
        """
        self._identity = json.loads(agree(json.dumps(identity()) if self.rank == 0 else "")[0])
        found = saver.find(self.place, self.rank, self.num_ranks, agree)
        self.notes = found.notes
        if found.checkpoint is not None:
            self._found = found.checkpoint
            disk_format.check_identity(self._found, self._identity, self.settings.allow_changes)
            manifest = self._found.manifest
            self.step, self.finished = manifest["step"], manifest["finished"]
            self.evaluations, self._metrics = list(manifest["evaluations"]), dict(manifest["metrics"])
            if self.rank == 0:
                self.events = self._found.events()
                logger.info("resuming from %s", self._found.url)
        self.saver.last_step = self.step if self._found is not None else -1
        problem = ""
        try:
            self.saver.start()
        except OSError as error:
            problem = str(error)
        problem = agree(problem)[0]
        if problem:
            raise TrainingError(f"checkpoint_dir could not be cleared by rank 0: {problem}")

    @property
    def resumed(self) -> str | None:
        """Location of the checkpoint that the run resumes from."""
        return None if self._found is None else self._found.url

    def restore(self, state: Any) -> Any:
        """Return the found state, split as `state` is; `state` itself if nothing was found."""
        if self._found is None:
            return state
        # Keras' optimizers hold the learning rate as a variable. A deliberate change of the rate must not be undone.
        changed = self._found.manifest["identity"].get("optimizer") != self._identity["optimizer"]
        state = saver.restore(
            self._found, state, skip=lambda name: changed and name.rpartition("/")[2] == "learning_rate"
        )
        self._found = Checkpoint(self._found.place, self._found.directory, self._found.manifest)
        return state

    # --- while it runs -----------------------------------------------------------------------------------------------

    def note(self, event: dict[str, Any]) -> None:
        """Record a logged step or an evaluation; every rank records the same."""
        if event["kind"] not in HISTORY:
            return
        if self.rank == 0:
            self.events.append(event)
        if event["kind"] == "skipped":
            return
        values = {name: value for name, value in event.items() if name not in ("kind", "step")}
        self._metrics = {**self._metrics, **values}
        if event["kind"] == "eval":
            self.evaluations.append({"step": event["step"], **values})

    def is_due(self, step: int, evaluated: bool) -> bool:
        if evaluated and self.settings.score_attribute is not None:
            return True
        return step % self.settings.save_interval_steps == 0

    def save(self, step: int, state: Any, finished: str | None = None) -> None:
        """Save the state after `step` steps, in the background; with `finished`, wait until it is committed."""
        if self.saver.last_step != step or finished != self.finished:
            document = {
                "identity": self._identity,
                "base": self.base,
                "tensors": dict(self.tensors),
                "metrics": self._metrics,
                "evaluations": self.evaluations,
                "finished": finished,
            }
            self.saver.save(step, state, document, self.events)
            self.finished = finished
        if finished:
            self.settle()

    def settle(self) -> None:
        """Wait until the last save is committed and every rank knows it. If one rank left before, Ray would end the
        group.

        Raises:
            TrainingError: saving failed on a rank; every rank raises an error.
        """
        problem, own = "", None
        try:
            self.saver.wait()
        except Exception as error:
            own, problem = error, f"{type(error).__name__}: {error}"
        problems = agree(problem)
        if own is not None:
            raise own
        for rank, text in enumerate(problems):
            if text:
                raise TrainingError(f"rank {rank} could not save: {text}")

    def has_stopped_improving(self) -> bool:
        """Return True if `early_stopping_patience` evaluations have passed without a better score."""
        patience, keep = self.settings.early_stopping_patience, self.settings.keep
        if patience is None:
            return False
        score = keep.score
        assert score is not None  # a Checkpointer with patience has one
        for row in self.evaluations:
            if score not in row:
                raise ConfigError(f"score_attribute={score!r} is not among an evaluation's {sorted(row)}")
        return keep.since_best([row[score] for row in self.evaluations]) >= patience

    @property
    def newest(self) -> str | None:
        """On rank 0, return the location of the newest committed checkpoint."""
        return self.saver.newest

    @property
    def best(self) -> str | None:
        """On rank 0, return the location of the best checkpoint, by `score_attribute`."""
        return self.saver.best


def identity_of(spec: RunSpec, base: BaseCheckpoint, order: Any) -> dict[str, Any]:
    """Return the values that identify a run, by the names of `checkpointer.IDENTITY`."""
    return {
        "base": (base.original or base).fingerprint(),
        "precision": spec.model.precision,
        "quantize": spec.model.quantize,
        "lora": spec.model.lora and spec.model.lora.recorded(),
        "optimizer": optimizer_identity(*spec.step.optimizer),
        "seed": spec.step.seed,
        "data": sequence_identity(order, spec.train.store.content, spec.train.packed_len),
    }


def optimizer_identity(kind: str, value: Any) -> str:
    """Return a text to compare two runs' optimizers by. An optax transformation is opaque, so its state must fit."""
    if kind != "keras":
        return kind
    config = {**value, "config": {**value["config"], "name": None}}
    return f"{value['class_name']} {hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]}"


def sequence_identity(order: Any, content: str, packed_len: int | None) -> dict[str, Any]:
    """Return the values that the sequence of batches is a function of."""
    return {
        "content": content,
        "rows": order.num_rows,
        "global_batch_rows": order.batch_rows,
        "packed_len": packed_len,
        "shuffle": order.shuffle,
        "seed": order.seed,
        "shuffle_rows": order.shuffle_rows,
        "parts": [dataclasses.astuple(part) for part in order.parts],
        "grouped_by_length": getattr(order, "lengths", None) is not None,
    }
