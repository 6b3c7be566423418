"""Publish to an object store, which cannot rename a directory. So

* a marker object is created first, which only one writer can do; it holds the place and is deleted last;
* config.json and adapter_config.json, without which no loader reads the rest, are put after everything else;
* a failure takes back the objects that were put, in the opposite order.

A killed export therefore leaves files that nobody can load, under a marker that names their plan and the finished ones.
Another run can continue from there on request (resume). Nothing is ever written through a remote `open()`: an exception
inside it would publish the truncated object.
"""

import contextlib
import logging
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kithara_ray.errors import CheckpointError, DestinationError, ExportError
from kithara_ray.hf.fetch import fetch_header
from kithara_ray.hf.publish.stage import MARKER, Journal, Stage, publishing_order
from kithara_ray.storage.objects import put_file, receipt_of
from kithara_ray.storage.scratch import scratch
from kithara_ray.storage.urls import cause_of, filesystem

log = logging.getLogger(__name__)


@dataclass
class StoreStage(Stage):
    """`target` is the destination. `placed` names the objects to take back if the export fails."""

    fs: Any = None
    root: str = ""
    placed: list[str] = field(default_factory=list)

    def expect(self, names: list[str]) -> None:
        self.placed += [name for name in names if name not in self.placed]

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        super().add(name, record)
        self.save()

    def kept(self) -> dict[str, dict[str, Any]]:
        """Return the records whose object is still the one that was put, according to the store."""
        kept = {}
        for name, record in self.journal.parts.items():
            with contextlib.suppress(FileNotFoundError):
                if receipt_of(self.fs.info(f"{self.root}/{name}")) == record.get("receipt"):
                    kept[name] = record
        return kept

    def save(self) -> None:
        """Write the journal into the marker unless another writer has taken over. Raises DestinationError."""
        self.check_owner()
        try:
            self.fs.pipe_file(f"{self.root}/{MARKER}", self.journal.to_bytes())
        except Exception as error:
            raise DestinationError(f"{self.target}: {MARKER} could not be written ({cause_of(error)})") from error

    def check_owner(self) -> None:
        """Check that the marker is still ours. Raises DestinationError if a resumed export has taken over the place."""
        try:
            found = Journal.of(self.fs.cat_file(f"{self.root}/{MARKER}"))
        except Exception as error:
            raise DestinationError(f"{self.target}: {MARKER} is gone ({cause_of(error)}); start again") from error
        if found.writer != self.journal.writer:
            raise _TakenOverError(f"{self.target}: taken over by {found.author}; nothing was published by this export")

    def read_headers(self, directory: Path) -> None:
        for name in self.placed:
            try:
                size_bytes = int(self.fs.info(f"{self.root}/{name}")["size"])
                fetch_header(self.fs, f"{self.root}/{name}", directory / name, size_bytes)
            except (CheckpointError, OSError) as error:
                raise ExportError(f"{self.target}/{name}: was written but does not read back ({error})") from error


class _TakenOverError(DestinationError):
    """The content of the destination belongs to another writer."""


def check(url: str) -> None:
    """See `publish.check_destination`."""
    _release(_claim(url, Path(), "", resume=False))


@contextlib.contextmanager
def staged(url: str, plan: str, resume: bool) -> Generator[StoreStage]:
    """See `publish.staged`."""
    with scratch() as directory:
        stage = _claim(url, directory, plan, resume)
        try:
            yield stage
            files = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
            stage.check_owner()
            for name in sorted(files, key=publishing_order):
                stage.placed.append(name)
                put_file(directory / name, url, name)
        except _TakenOverError:
            raise
        except BaseException:
            left = [] if resume else _take_back(stage)
            if left:
                log.error("%s: objects of a failed export could not be deleted: %s", url, ", ".join(left))
            raise
    try:
        _release(stage)
    except DestinationError as error:  # the export is complete nevertheless
        log.warning("%s", error)
    log.info("published %s: files=%d", url, len(stage.placed))


def _claim(url: str, directory: Path, plan: str, resume: bool) -> StoreStage:
    """Claim a place on an object store to which only this process writes."""
    fs, root = filesystem(url, DestinationError)
    stage = StoreStage(directory, url, Journal(plan), fs, root)
    if _is_unfinished(stage):
        if not resume:
            raise DestinationError(
                f"{url} holds an unfinished export, of {_left(stage).author}. If that export no longer runs, pass "
                "resume=True to continue it, remove its files, or choose another destination"
            )
        _take_over(stage)
        return stage
    try:
        fs.pipe_file(f"{root}/{MARKER}", stage.journal.to_bytes(), mode="create")
    except FileExistsError:
        raise DestinationError(f"{url}: another export is being written there; choose another destination") from None
    except Exception as error:
        raise DestinationError(
            f"{url}: an object could not be written there ({cause_of(error)}); "
            "check that the bucket exists and that this host's credentials may write to it"
        ) from error
    return stage


def _left(stage: StoreStage) -> Journal:
    try:
        return Journal.of(stage.fs.cat_file(f"{stage.root}/{MARKER}"))
    except Exception as error:
        raise DestinationError(f"{stage.target}/{MARKER}: cannot be read ({cause_of(error)})") from error


def _take_over(stage: StoreStage) -> None:
    """Make the marker ours, then delete everything except the proven weight files of the same plan.

    The files from which loaders start are deleted first.
    """
    earlier = _left(stage)
    if earlier.plan == stage.journal.plan:
        stage.journal.parts = earlier.parts
        stage.journal.parts = stage.kept()
    try:
        stage.fs.pipe_file(f"{stage.root}/{MARKER}", stage.journal.to_bytes())
        names = [name.removeprefix(stage.root).lstrip("/") for name in stage.fs.find(stage.root)]
        stale = [name for name in names if name and name != MARKER and name not in stage.journal.parts]
        left = _delete(stage, sorted(stale, key=publishing_order, reverse=True))
    except Exception as error:
        raise DestinationError(f"{stage.target}: could not be taken over ({cause_of(error)})") from error
    if left:
        raise DestinationError(f"{stage.target}: {left[0]} could not be deleted; remove all of it and start again")
    log.info("resumed %s: files=%d of %s", stage.target, len(stage.journal.parts), earlier.author)


def _is_unfinished(stage: StoreStage) -> bool:
    """True if a marker is there. Raises DestinationError if there is anything else without a marker."""
    fs, root, url = stage.fs, stage.root, stage.target
    try:
        found = [entry["name"] for entry in fs.ls(root, detail=True)]
    except (FileNotFoundError, NotADirectoryError):
        return False
    except Exception as error:
        raise DestinationError(f"{url}: cannot be listed ({cause_of(error)}); check credentials") from error
    found = [name for name in found if name.strip("/") != root.strip("/") or _is_object(fs, name)]
    if any(name.endswith(f"/{MARKER}") for name in found):
        return True
    if found:
        raise DestinationError(f"{url} exists and is not empty ({found[0]}); remove it or choose another destination")
    return False


def _is_object(fs: Any, name: str) -> bool:
    """True if a real object has this name; a listing of "dir/" may hold only the placeholder "dir/" (size 0)."""
    try:
        info = fs.info(name)
    except FileNotFoundError:
        return False
    return info["type"] == "file" and bool(info.get("size"))


def _release(stage: StoreStage) -> None:
    try:
        stage.fs.rm_file(f"{stage.root}/{MARKER}")
    except Exception as error:
        raise DestinationError(
            f"{stage.target}: objects can be written there but not deleted ({cause_of(error)}); "
            f"allow deletion, and remove {stage.root}/{MARKER}"
        ) from error


def _take_back(stage: StoreStage) -> list[str]:
    """Delete the objects that were put, then the marker; return those that could not be deleted.

    The files from which loaders start are deleted first. If one of them cannot be deleted, the rest stays too: an
    export is complete or absent.
    """
    return _delete(stage, [*sorted(stage.placed, key=publishing_order, reverse=True), MARKER])


def _delete(stage: StoreStage, names: Iterable[str]) -> list[str]:
    """Delete objects in this order up to the first that cannot be deleted; return the rest from there."""
    names = list(names)
    for number, name in enumerate(names):
        try:
            stage.fs.rm_file(f"{stage.root}/{name}")
        except FileNotFoundError:
            continue
        except Exception:
            return names[number:]
    return []
