"""Save and restore a run's state while it is on devices.

Each save copies the state to host memory at the step and writes it in a thread, at most one at a time. Ranks do not
communicate: each puts its part, rank 0 sees all parts appear, and puts the manifest.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from kithara_ray.checkpoint import disk_format
from kithara_ray.checkpoint.disk_format import Checkpoint, Keep
from kithara_ray.errors import CheckpointError, ConfigError, TrainingError
from kithara_ray.sharding.gather import local_shards
from kithara_ray.storage.places import Place

logger = logging.getLogger(__name__)

# Prefix of the directories in which the ranks of an attempt check that they share the place.
PROBE = ".hosts-"
_LOOK_S = 0.1
_LOOK_MOST_S = 2.0


def named_arrays(state: Any) -> dict[str, jax.Array]:
    """Return a state's arrays by their paths, e.g. `params/<factor>`, `opt/<variable>`, `step`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class Saver:
    """A saver of one rank's part of a run.

    Args:
        attempt: 8 hex digits that all ranks of this attempt share and no other attempt has.
        keep: the rule for which checkpoints to keep.
        timeout_s: seconds that rank 0 waits for the other ranks' parts.
        on_commit: called on rank 0, in the writing thread, with the directory's URL and the seconds that the save took.
    """

    def __init__(
        self,
        place: Place,
        attempt: str,
        rank: int,
        num_ranks: int,
        keep: Keep,
        timeout_s: float,
        on_commit: Callable[[str, float], None] = lambda directory, seconds: None,
    ):
        self.place, self.attempt, self.keep = place, attempt, keep
        self.rank, self.num_ranks, self.timeout_s = rank, num_ranks, timeout_s
        self.on_commit = on_commit
        self._committed: dict[str, Mapping[str, float]] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.last_step = -1

    def start(self) -> None:
        """Rank 0: find the committed checkpoints, and remove those that earlier attempts did not finish."""
        if self.rank:
            return
        for directory in disk_format.committed(self.place):
            try:
                manifest = Checkpoint.open(self.place, directory).manifest
            except CheckpointError:
                continue
            self._committed[directory] = manifest["metrics"]
        left = [name for name in self.place.directories() if name.startswith(PROBE)]
        for directory in disk_format.unfinished(self.place) + left:
            disk_format.remove(self.place, directory)
        self.place.clear_scratch()

    @property
    def newest(self) -> str | None:
        """Rank 0: the URL of the newest committed checkpoint."""
        newest = max(self._committed, key=lambda name: (disk_format.step_of(name), name), default=None)
        return None if newest is None else self.place.url(newest)

    @property
    def best(self) -> str | None:
        """Rank 0: the URL of the best checkpoint that is kept."""
        best = self.keep.best(self._committed)
        return None if best is None else self.place.url(best)

    def save(self, step: int, state: Any, document: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
        """Wait for the previous save, copy the state, and write it in a thread.

        Args:
            document, events: as in `disk_format.commit`; only rank 0's are used.

        Raises: the previous save's error, if it failed.
        """
        self.wait()
        arrays = named_arrays(state)
        for array in arrays.values():
            for shard in array.addressable_shards:
                if shard.replica_id == 0:
                    shard.data.copy_to_host_async()
        # On a CPU these are views. JAX does not let the next step write into a buffer that has a view.
        shards = local_shards(arrays, self.rank)
        shapes = {name: (array.shape, disk_format.tag_of(array.dtype)) for name, array in arrays.items()}
        arguments = (step, shards, shapes, dict(document), list(events))
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        self.last_step = step

    def check(self) -> None:
        """Raise the error of a save that failed, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until nothing is being written, and on rank 0 until the save is committed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _write(self, step, shards, shapes, document, events) -> None:
        directory = disk_format.directory_name(step, self.attempt)
        started = time.monotonic()
        try:
            disk_format.write_part(self.place, directory, shards, self.rank, self.num_ranks)
            if self.rank == 0:
                self._wait_for_parts(directory)
                disk_format.commit(self.place, directory, self.num_ranks, shapes, document, events)
                seconds = time.monotonic() - started
                size_bytes = sum(shard.data.nbytes for shard in shards)
                logger.info("saved step %d in %.2f s (%.1f MB on rank 0)", step, seconds, size_bytes / 1e6)
                self._committed[directory] = document.get("metrics", {})
                self._prune()
                self.on_commit(self.place.url(directory), seconds)
        except BaseException as error:
            self._error = error

    def _wait_for_parts(self, directory: str) -> None:
        deadline, pause_s = time.monotonic() + self.timeout_s, _LOOK_S
        while True:
            missing = set(range(self.num_ranks)) - set(disk_format.parts_of(self.place, directory, self.num_ranks))
            if not missing:
                return
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"{self.place.url(directory)}: rank {min(missing)} has not written its part after "
                    f"{self.timeout_s:g} s, so the checkpoint is not committed"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_MOST_S)

    def _prune(self) -> None:
        for directory in self.keep.victims(self._committed):
            disk_format.remove(self.place, directory)
            del self._committed[directory]


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, if any; `notes` says which others were passed over, and why."""

    checkpoint: Checkpoint | None
    notes: tuple[str, ...]


def find(place: Place, rank: int, num_ranks: int, agree: Callable[[str], list[str]]) -> Found:
    """Find the newest complete checkpoint. All ranks call this; each verifies a share of its files.

    Args:
        agree: gives every rank's text to every rank, in order of ranks.

    Raises:
        CheckpointError: there are checkpoints, but none is complete; or a rank does not see them.
    """
    own = _attempt(lambda: "\n".join(disk_format.committed(place)))
    texts = agree("|".join(own))
    _raise_first(texts)
    listed = [text.partition("|")[2] for text in texts]
    if len(set(listed)) > 1:
        other = next(rank for rank, names in enumerate(listed) if names != listed[0])
        raise CheckpointError(
            f"{place.root}: rank {other} sees different checkpoints there from rank 0; it must be a directory that all "
            "hosts share, or a URL such as gs://bucket/dir"
        )
    notes = []
    for directory in listed[0].split("\n") if listed[0] else []:
        opened = []

        def verify(directory=directory, opened=opened) -> str:
            found = Checkpoint.open(place, directory)
            found.verify(found.files[rank::num_ranks])
            opened.append(found)
            return ""

        problems = [text.partition("|")[0] for text in agree("|".join(_attempt(verify)))]
        if not any(problems):
            return Found(opened[0], tuple(notes))
        notes.append(next(problem for problem in problems if problem))
        logger.warning("skipped a checkpoint: %s", notes[-1])
    if notes:
        raise CheckpointError(f"{place.root}: no checkpoint there is complete: {'; '.join(notes)}")
    return Found(None, ())


def _attempt(call: Callable[[], str]) -> tuple[str, str]:
    """Run `call` and return (problem, result)."""
    try:
        return "", call()
    except (CheckpointError, OSError) as error:
        return str(error).replace("|", "/") or type(error).__name__, ""


def _raise_first(texts: Sequence[str]) -> None:
    for rank, text in enumerate(texts):
        problem = text.partition("|")[0]
        if problem:
            raise CheckpointError(f"rank {rank}: {problem}")


def restore(found: Checkpoint, state: Any, skip: Callable[[str], bool] = lambda name: False) -> Any:
    """Return a state with a checkpoint's values, split like `state`; that one is no longer usable.

    Args:
        skip: true for the names of arrays that keep their values.

    Raises:
        ConfigError: the checkpoint has other arrays, shapes or dtypes.
    """
    names = named_arrays(state)
    entries = found.manifest["arrays"]
    for name, array in names.items():
        ours = (list(array.shape), disk_format.tag_of(array.dtype))
        theirs = (entries[name]["shape"], entries[name]["dtype"]) if name in entries else None
        if theirs != ours and not skip(name):
            raise ConfigError(f"{found.url}: {name} is {theirs or 'not there'}, this run's is {ours}")
    surplus = sorted(set(entries) - set(names))
    if surplus:
        raise ConfigError(f"{found.url}: holds {surplus[0]}, which this run does not have")

    def placed(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if skip(name):
            return leaf
        shape, sharding = leaf.shape, leaf.sharding
        # One array at a time, so that memory never holds a full-parameter state twice.
        leaf.delete()
        return jax.make_array_from_callback(shape, sharding, lambda index: found.read(name, index))

    return jax.tree_util.tree_map_with_path(placed, state)
