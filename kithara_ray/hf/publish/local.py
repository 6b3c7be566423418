"""Publish to a local destination: fill a hidden sibling of it, fsync and rename it.

The sibling is locked while its writer lives (flock), so a second writer is refused at once. The files of a dead writer
are recognised, and either reused (resume) or removed.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from kithara_ray.errors import DestinationError, KitharaRayError
from kithara_ray.hf.publish.stage import MARKER, Journal, Stage
from kithara_ray.storage.atomic import sync, write_atomic
from kithara_ray.storage.urls import cause_of

log = logging.getLogger(__name__)


class LocalStage(Stage):
    """`directory` is the hidden sibling."""

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        super().add(name, record)
        self.save()

    def save(self) -> None:
        """Replace the journal as a whole: a kill leaves either the old or the new one."""
        write_atomic(self.directory / MARKER, self.journal.to_bytes())

    def kept(self) -> dict[str, dict[str, Any]]:
        return {
            name: record for name, record in self.journal.parts.items() if (self.directory / name).is_file()
        }  # the process that reads them checks their SHA-256


def check(path: Path) -> None:
    """See `publish.check_destination`."""
    if path.is_symlink() and not path.exists():
        raise DestinationError(f"{path} is a dangling link; remove it or choose another destination")
    if path.exists():
        if not path.is_dir():
            raise DestinationError(f"{path} exists and is a file; choose another destination")
        if next(path.iterdir(), None) is not None:
            raise DestinationError(f"{path} exists and is not empty; remove it or choose another destination")
    ancestor = path.resolve().parent  # the staging directory is a sibling of the destination
    while not ancestor.exists():
        ancestor = ancestor.parent
    try:
        probe = Path(tempfile.mkdtemp(prefix=".kithara_ray_probe_", dir=ancestor))
        probe.rmdir()
    except OSError as error:
        raise DestinationError(f"{path}: {ancestor} cannot be written ({cause_of(error)}); choose another") from error


@contextlib.contextmanager
def staged(path: Path, plan: str, resume: bool) -> Generator[LocalStage]:
    """See `publish.staged`."""
    check(path)
    target = path.resolve()
    made = [path for path in target.parents if not path.exists()]  # deepest first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{target.name}.staging", target) as staging:
            try:
                stage = _open(staging, plan, resume)
                yield stage
                (staging / MARKER).unlink()
                _sync_tree(staging)
                _rename(staging, target)
            except BaseException:
                if not resume:
                    shutil.rmtree(staging, ignore_errors=True)
                raise
    except BaseException as error:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and not isinstance(error, KitharaRayError):
            raise DestinationError(f"{target}: not published, writing failed ({cause_of(error)})") from error
        raise
    sync(target.parent)
    log.info("published %s", target)


@contextlib.contextmanager
def _locked(staging: Path, target: Path) -> Generator[Path]:
    """Lock the staging directory, so that no other living process writes to it. Raises DestinationError."""
    staging.mkdir(exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DestinationError(
                f"{target}: another export is being written there; choose another destination"
            ) from None
        except OSError as error:
            raise DestinationError(f"{staging}: cannot be locked ({cause_of(error)}); choose another") from error
        if not staging.exists() or not os.path.samestat(os.fstat(descriptor), staging.stat()):
            raise DestinationError(f"{target}: another export finished there in the meantime; start again")
        yield staging
    finally:
        os.close(descriptor)


def _open(staging: Path, plan: str, resume: bool) -> LocalStage:
    """Open the stage in a directory that may hold a dead writer's files."""
    journal = Journal(plan)
    left = staging / MARKER
    if resume and left.is_file():
        earlier = Journal.of(left.read_bytes())
        if earlier.plan == plan:
            journal.parts = earlier.parts
    for entry in staging.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in journal.parts:
            entry.unlink()
    stage = LocalStage(staging, str(staging), journal)
    stage.save()
    return stage


def _rename(staging: Path, target: Path) -> None:
    try:
        os.rename(staging, target)
    except OSError as error:
        raise DestinationError(f"{target}: not published ({cause_of(error)}); was it filled meanwhile?") from error


def _sync_tree(directory: Path) -> None:
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))
