"""Checkpoints of a run as files, on a disk or an object store. This module needs no JAX: it names numpy arrays.

    <checkpoint_dir>/
      step-00000020-1f2e3d4c/                        one step of one attempt; no other attempt writes there
        00000-of-00002.<sha256>.safetensors          rank 0's slices: `<array>@<start>:<stop>,...` -> that slice
        00001-of-00002.<sha256>.safetensors
        events.<sha256>.json                         the run's history up to this step
        manifest.json                                written last; without it the directory is no checkpoint

Every file appears whole or not at all, under a name that holds its hash: locally by a rename after fsync, on an object
store by a single put. The slices tile every array, so a run can resume on another mesh or number of hosts. No host
needs to hold more than its own part.
"""

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kithara_ray.errors import CheckpointError, ConfigError
from kithara_ray.hf.fetch import fetch_header
from kithara_ray.hf.safetensors_file import NUMPY_DTYPES, TAGS, TensorInfo, read_header, write_arrays
from kithara_ray.sharding.gather import Bounds, Shard
from kithara_ray.storage.places import Place
from kithara_ray.storage.scratch import scratch
from kithara_ray.storage.urls import cause_of

logger = logging.getLogger(__name__)

FORMAT, VERSION = "kithara_ray checkpoint", 1
MANIFEST = "manifest.json"
_DIRECTORY = re.compile(r"step-(\d{8,})-([0-9a-f]{8})")
_PART = re.compile(r"(\d{5})-of-(\d{5})\.([0-9a-f]{64})\.safetensors")
# A part up to this size is read as a whole; from a larger part, only the requested slices are read.
_WHOLE_BYTES = 256_000_000


def directory_name(step: int, attempt: str) -> str:
    return f"step-{step:08d}-{attempt}"


def step_of(directory: str) -> int:
    return int(_groups(_DIRECTORY, directory)[0])


def _groups(pattern: re.Pattern[str], name: str) -> tuple[str, ...]:
    """Return the groups of a name of this format."""
    found = pattern.fullmatch(name)
    assert found is not None, name
    return found.groups()


# --------------------------------------------------------------------------------------------------------------- write


def write_part(place: Place, directory: str, shards: Sequence[Shard], rank: int, num_ranks: int) -> None:
    """Write the part that one rank holds; every rank writes one, even an empty one.

    Raises:
        DestinationError: the part cannot be written.
    """
    arrays = {f"{shard.name}@{_show(shard.bounds)}": shard.data for shard in shards}
    with place.scratch() as scratch:
        local = scratch / "part"
        write_arrays(local, arrays, {"format": FORMAT, "version": str(VERSION)})
        with local.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        place.put(local, directory, f"{rank:05d}-of-{num_ranks:05d}.{digest}.safetensors")


def parts_of(place: Place, directory: str, num_ranks: int) -> dict[int, tuple[str, int]]:
    """Return the parts that are there: rank -> (file name, bytes)."""
    found = {}
    for name, size_bytes in place.files(directory).items():
        match = _PART.fullmatch(name)
        if match and int(match[2]) == num_ranks:
            found[int(match[1])] = (name, size_bytes)
    return found


def commit(
    place: Place,
    directory: str,
    num_ranks: int,
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    document: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
) -> None:
    """Make a directory that holds all parts a checkpoint.

    Args:
        arrays: name -> (shape, safetensors tag of the dtype), of the whole arrays.
        document: JSON, the manifest's other entries: "identity", "metrics", "evaluations", ...
        events: JSON, the run's history.

    Raises:
        DestinationError: the checkpoint cannot be written.
    """
    files = {}
    for name, size_bytes in parts_of(place, directory, num_ranks).values():
        files[name] = {"bytes": size_bytes, "sha256": _groups(_PART, name)[2]}
    assert len(files) == num_ranks, f"{len(files)} of {num_ranks} parts"
    raw = json.dumps(list(events)).encode()
    digest = hashlib.sha256(raw).hexdigest()
    place.put_bytes(raw, directory, f"events.{digest}.json")
    files[f"events.{digest}.json"] = {"bytes": len(raw), "sha256": digest}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step_of(directory),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": files,
        "arrays": {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in arrays.items()},
        **document,
    }
    manifest["sha256"] = _digest(manifest)
    place.put_bytes(json.dumps(manifest, indent=1).encode(), directory, MANIFEST)


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _show(bounds: Bounds) -> str:
    return ",".join(f"{start}:{stop}" for start, stop in bounds)


# ---------------------------------------------------------------------------------------------------------------- read


def committed(place: Place) -> list[str]:
    """List the directories with a manifest, newest step first."""
    names = [name for name in place.directories() if _DIRECTORY.fullmatch(name) and MANIFEST in place.files(name)]
    return sorted(names, key=lambda name: (step_of(name), name), reverse=True)


def unfinished(place: Place) -> list[str]:
    """List the directories of saves that were never committed."""
    names = [name for name in place.directories() if _DIRECTORY.fullmatch(name)]
    return [name for name in names if MANIFEST not in place.files(name)]


def remove(place: Place, directory: str) -> None:
    """Remove a checkpoint, its manifest first: a partly removed directory is not a checkpoint."""
    names = place.files(directory)
    place.remove(directory, sorted(names, key=lambda name: (name != MANIFEST, name)))


@dataclass
class Checkpoint:
    """An open, committed checkpoint; it reads its files on request.

    Attributes:
        url: its location.
        manifest: the content of its manifest.json.
    """

    place: Place
    directory: str
    manifest: dict[str, Any]
    _slices: dict[str, list[tuple[Bounds, TensorInfo]]] | None = field(default=None, repr=False)
    _whole: dict[str, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, place: Place, directory: str) -> "Checkpoint":
        """Open a checkpoint. Raises CheckpointError if the manifest is damaged or of another version."""
        url = place.url(directory)
        try:
            manifest = json.loads(place.read(directory, MANIFEST))
            intact = manifest.get("format") == FORMAT and manifest["sha256"] == _digest(manifest)
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise CheckpointError(f"{url}: its manifest cannot be read ({cause_of(error)})") from error
        if not intact:
            raise CheckpointError(f"{url}: its manifest is damaged: its hash is not the one in its name")
        if manifest["version"] != VERSION:
            raise CheckpointError(
                f"{url}: version {manifest['version']} of the format, this release reads {VERSION}; "
                "resume with the release that wrote it"
            )
        return cls(place, directory, manifest)

    @property
    def url(self) -> str:
        return self.place.url(self.directory)

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def files(self) -> list[str]:
        return sorted(self.manifest["files"])

    def verify(self, files: Sequence[str] | None = None) -> None:
        """Read the files (default: all) and check their hashes.

        Raises:
            CheckpointError: a file is damaged or cannot be read; the message names it.
        """
        for name in self.files if files is None else files:
            expected = self.manifest["files"][name]
            try:
                found = self.place.sha256(self.directory, name)
            except OSError as error:
                raise CheckpointError(f"{self.url}/{name} cannot be read ({cause_of(error)})") from error
            if found != expected["sha256"]:
                raise CheckpointError(f"{self.url}/{name} is damaged: its SHA-256 is {found}, not what was written")

    def events(self) -> list[dict[str, Any]]:
        name = next(name for name in self.files if name.startswith("events."))
        return json.loads(self.place.read(self.directory, name))

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Read a slice of one array, or all of it.

        Raises:
            CheckpointError: there is no such array, or its slices do not cover the request.
        """
        if name not in self.manifest["arrays"]:
            raise CheckpointError(f"{self.url} has no array {name!r}")
        entry = self.manifest["arrays"][name]
        shape = tuple(entry["shape"])
        index = (slice(None),) * len(shape) if index is None else index
        wanted = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        out = np.empty([stop - start for start, stop in wanted], NUMPY_DTYPES[entry["dtype"]])
        covered = 0
        for bounds, info in self._tensors().get(name, ()):
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, wanted, strict=True)]
            if any(start >= stop for start, stop in common):
                continue
            tensor = self._tensor(info)
            source = tuple(slice(lo - a, hi - a) for (lo, hi), (a, _) in zip(common, bounds, strict=True))
            target = tuple(slice(lo - a, hi - a) for (lo, hi), (a, _) in zip(common, wanted, strict=True))
            out[target] = tensor[source]
            covered += math.prod(hi - lo for lo, hi in common)
        if covered != out.size:
            raise CheckpointError(f"{self.url}: its slices of {name!r} hold {covered} of {out.size} elements asked for")
        return out

    def adapter(self) -> dict[str, np.ndarray]:
        """Return the adapter's tensors by their own names, from the arrays that were trained."""
        tensors = {}
        for name, parts in self.manifest["tensors"].items():
            whole = self.read(name)
            pieces = whole if len(parts) > 1 or whole.ndim > 2 else [whole]
            tensors |= dict(zip(parts, pieces, strict=True))
        return tensors

    def _tensors(self) -> dict[str, list[tuple[Bounds, TensorInfo]]]:
        """Map each array to its slices, (bounds, location), from the parts' headers, which are read once."""
        if self._slices is None:
            self._slices = {}
            with scratch() as directory:
                for name in self.files:
                    if not _PART.fullmatch(name):
                        continue
                    local = directory / name
                    remote = self.place.path(self.directory, name)
                    fetch_header(self.place.fs, remote, local, self.manifest["files"][name]["bytes"])
                    for key, info in read_header(local)[0].items():
                        array, _, bounds = key.rpartition("@")
                        pairs = [pair.split(":") for pair in bounds.split(",") if pair]
                        slices = tuple((int(start), int(stop)) for start, stop in pairs)
                        self._slices.setdefault(array, []).append((slices, info))
        return self._slices

    def _tensor(self, info: TensorInfo) -> np.ndarray:
        name = info.file.name
        if self.manifest["files"][name]["bytes"] <= _WHOLE_BYTES:
            if name not in self._whole:
                self._whole[name] = self.place.read(self.directory, name)
            raw = memoryview(self._whole[name])[info.offset : info.offset + info.nbytes]
        else:
            raw = self.place.read(self.directory, name, info.offset, info.offset + info.nbytes)
        return np.frombuffer(raw, info.numpy_dtype).reshape(info.shape)


def tag_of(dtype: np.dtype) -> str:
    """Return the safetensors tag of a dtype."""
    return TAGS[np.dtype(dtype)]


# ------------------------------------------------------------------------------------------------------------ the same


def check_identity(checkpoint: Checkpoint, mine: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse a checkpoint of a different run, except for the settings that may differ.

    Raises:
        ConfigError: a setting differs; the message names it with both values.
    """
    theirs = checkpoint.manifest["identity"]
    for name, value in mine.items():
        value = json.loads(json.dumps(value))
        if theirs.get(name) != value and name not in allowed:
            raise ConfigError(
                f"{checkpoint.url} is from a run with another {name}: {_differs(theirs.get(name), value)}. Give the "
                f"same value, or another checkpoint_dir; Checkpointer(allow_changes=({name!r},)) continues anyway"
            )


def _differs(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        names = [name for name in now if then.get(name) != now[name]]
        return ", ".join(f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in names)
    return f"it was {then!r} and is {now!r}"


# ---------------------------------------------------------------------------------------------------------------- keep


@dataclass(frozen=True)
class Keep:
    """The rule for which checkpoints to keep.

    Attributes:
        max_to_keep: the number to keep; None keeps all.
        score: the metric by which to keep the best; None keeps the newest.
        order: "min" or "max": the direction in which a score is better.
    """

    max_to_keep: int | None = 5
    score: str | None = None
    order: str = "min"

    def victims(self, kept: Mapping[str, Mapping[str, float]]) -> list[str]:
        """List the directories to remove from directory -> metrics. The newest always stays: a run resumes from it."""
        if self.max_to_keep is None:
            return []
        newest_first = sorted(kept, key=lambda name: (step_of(name), name), reverse=True)
        ranked = sorted(newest_first[1:], key=lambda name: self._badness(kept[name]))
        best = self.best(kept)
        if best in ranked:
            ranked.remove(best)
            ranked.insert(0, best)
        return ranked[self.max_to_keep - 1 :]

    def best(self, kept: Mapping[str, Mapping[str, float]]) -> str | None:
        """Return the directory with the best score; the newest if nothing is scored."""
        newest_first = sorted(kept, key=lambda name: (step_of(name), name), reverse=True)
        return min(newest_first, key=lambda name: self._badness(kept[name]), default=None)

    def _badness(self, metrics: Mapping[str, float]) -> float:
        return self._badness_of(metrics.get(self.score) if self.score else 0.0)

    def _badness_of(self, value: float | None) -> float:
        if value is None or not math.isfinite(value):
            return math.inf
        return -value if self.order == "max" else value

    def since_best(self, scores: Sequence[float]) -> int:
        """Count the evaluations since the best score; all of them if no score is finite."""
        badness = [self._badness_of(score) for score in scores]
        finite = [value for value in badness if value < math.inf]
        return len(scores) - 1 - badness.index(min(finite)) if finite else len(scores)
