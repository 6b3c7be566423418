"""Where exports go: local directories and whatever fsspec knows (gs://, s3://). Readers find all of one or none of it.

Local: a hidden sibling is filled, fsynced and renamed. Object stores have no rename of a directory; there

* a marker object is created first, which only one writer can do; it holds the place and is deleted last;
* config.json and adapter_config.json, without which no loader reads the rest, are put after everything else;
* a failure takes back what was put, in the opposite order.

A killed export so leaves files that load nowhere, under a marker that says what they are. Nothing is ever written
through a remote `open()`: an exception inside it would publish the truncated object.
"""

import base64
import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kithara_ray.errors import CheckpointError, DestinationError, ExportError
from kithara_ray.hf.storage import cause_of, fetch_header, filesystem, is_url

log = logging.getLogger(__name__)

MARKER = ".kithara_ray_unfinished"
PUBLISHED_LAST = ("model.safetensors.index.json", "adapter_config.json", "config.json")


@dataclass
class Stage:
    """An export before anybody can load it.

    directory: local; what is written here is published with the rest.
    target: where weight files are put by whoever writes them: `directory`, or the destination's URL.
    placed: names of files put at a URL by others; taken back if the export fails.
    """

    directory: Path
    target: str
    placed: list[str] = field(default_factory=list)

    @property
    def is_remote(self) -> bool:
        return is_url(self.target)

    def headers_of_placed(self, directory: Path) -> None:
        """The headers of what was put at the URL, read back from there. Raises ExportError."""
        fs, root = filesystem(self.target, DestinationError)
        for name in self.placed:
            try:
                fetch_header(fs, f"{root}/{name}", directory / name, int(fs.info(f"{root}/{name}")["size"]))
            except (CheckpointError, OSError) as error:
                raise ExportError(f"{self.target}/{name}: was written but does not read back ({error})") from error


@contextlib.contextmanager
def staged(destination: str) -> Iterator[Stage]:
    """Yields where to write; publishes it at `destination` when the block ends without exception.

    On an exception the destination is as it was. Raises DestinationError.
    """
    destination = str(destination)
    if _is_local(destination):
        check_destination(destination)
        with _staged_local(_local_path(destination).resolve()) as stage:
            yield stage
    else:
        with _staged_remote(destination.rstrip("/")) as stage:
            yield stage


def check_destination(destination: str) -> None:
    """Raises DestinationError unless a directory can be published at `destination`. Leaves nothing behind.

    It must not exist, or be an empty directory; writing is probed by creating and deleting: credentials that are
    missing or expired show here and not after the training.
    """
    destination = str(destination)
    if _is_local(destination):
        _check_local(_local_path(destination))
    else:
        _release(_claim(destination.rstrip("/")))


def _is_local(destination: str) -> bool:
    return not is_url(destination) or destination.startswith("file://")


def _local_path(destination: str) -> Path:
    return Path(destination.removeprefix("file://")).expanduser().absolute()


# --------------------------------------------------------------------------------------------------------- local


def _check_local(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise DestinationError(f"{path} is a dangling link; remove it or choose another destination")
    if path.exists():
        if not path.is_dir():
            raise DestinationError(f"{path} exists and is a file; choose another destination")
        if next(path.iterdir(), None) is not None:
            raise DestinationError(f"{path} exists and is not empty; remove it or choose another destination")
    ancestor = path.resolve().parent  # the staging directory is made beside the destination
    while not ancestor.exists():
        ancestor = ancestor.parent
    try:
        probe = Path(tempfile.mkdtemp(prefix=".kithara_ray_probe_", dir=ancestor))
        probe.rmdir()
    except OSError as error:
        raise DestinationError(f"{path}: {ancestor} cannot be written ({error.strerror}); choose another") from error


@contextlib.contextmanager
def _staged_local(target: Path) -> Iterator[Stage]:
    made = _make_parents(target.parent)
    staging = target.parent / f".{target.name}.staging-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir()
        yield Stage(staging, str(staging))
        _sync_tree(staging)
        try:
            os.rename(staging, target)
        except OSError as error:
            raise DestinationError(f"{target}: not published ({error.strerror}); was it filled meanwhile?") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    _sync(target.parent)
    log.info("published %s", target)


def _make_parents(directory: Path) -> list[Path]:
    """Create the directory; returns those that were not there, deepest first."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return made


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    for parent, _, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


# ------------------------------------------------------------------------------------------------- object stores


@dataclass
class _Claim:
    """A place on an object store that this process alone writes to."""

    fs: Any
    root: str
    url: str

    @property
    def marker(self) -> str:
        return f"{self.root}/{MARKER}"


def _claim(url: str) -> _Claim:
    if url.startswith("hf://"):
        raise DestinationError(f"{url}: exports are not written to the hub; export locally, then `hf upload`")
    fs, root = filesystem(url, DestinationError)
    claim = _Claim(fs, root, url)
    _check_empty(claim)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    who = {"host": socket.gethostname(), "process": os.getpid(), "time": now}
    try:
        fs.pipe_file(claim.marker, json.dumps(who).encode(), mode="create")
    except FileExistsError:
        raise DestinationError(f"{url}: another export is being written there; choose another destination") from None
    except Exception as error:
        raise DestinationError(
            f"{url}: an object could not be written there ({cause_of(error)}); "
            "check that the bucket exists and that this host's credentials may write to it"
        ) from error
    return claim


def _check_empty(claim: _Claim) -> None:
    fs, root, url = claim.fs, claim.root, claim.url
    try:
        found = [entry["name"] for entry in fs.ls(root, detail=True)]
    except (FileNotFoundError, NotADirectoryError):
        return
    except Exception as error:
        raise DestinationError(f"{url}: cannot be listed ({cause_of(error)}); check credentials") from error
    found = [name for name in found if name.rstrip("/").lstrip("/") != root.lstrip("/") or _is_object(fs, name)]
    if any(name.endswith(f"/{MARKER}") for name in found):
        raise DestinationError(
            f"{url} holds an unfinished export ({MARKER} says whose); if nobody is writing it any more, remove all of "
            "it, or choose another destination"
        )
    if found:
        raise DestinationError(f"{url} exists and is not empty ({found[0]}); remove it or choose another destination")


def _is_object(fs: Any, name: str) -> bool:
    """A listing of "dir/" may hold the placeholder object "dir/" itself (size 0); a real object is in the way."""
    try:
        info = fs.info(name)
    except FileNotFoundError:
        return False
    return info["type"] == "file" and bool(info.get("size"))


def _release(claim: _Claim) -> None:
    try:
        claim.fs.rm_file(claim.marker)
    except Exception as error:
        raise DestinationError(
            f"{claim.url}: objects can be written there but not deleted ({cause_of(error)}); "
            f"permit deleting, and remove {claim.marker}"
        ) from error


@contextlib.contextmanager
def _staged_remote(url: str) -> Iterator[Stage]:
    claim = _claim(url)
    with tempfile.TemporaryDirectory(prefix="kithara_ray_export_") as directory:
        stage, put = Stage(Path(directory), url), []
        try:
            yield stage
            files = [path for path in Path(directory).rglob("*") if path.is_file()]
            for path in sorted(files, key=_publishing_order):
                name = path.relative_to(directory).as_posix()
                put.append(name)
                put_file(path, f"{url}/{name}")
        except BaseException as error:
            left = _take_back(claim, [*stage.placed, *put])
            if left:
                log.error("%s: objects of a failed export could not be deleted: %s", url, ", ".join(left))
            raise error
    try:
        _release(claim)
    except DestinationError as error:  # the export is whole all the same
        log.warning("%s", error)
    log.info("published %s: files=%d", url, len(put) + len(stage.placed))


def _publishing_order(path: Path) -> tuple[int, str]:
    return PUBLISHED_LAST.index(path.name) if path.name in PUBLISHED_LAST else -1, path.as_posix()


def put_file(local: Path, url: str) -> None:
    """Upload one file and check what arrived: its size, and its MD5 where the store tells one (GCS)."""
    fs, remote = filesystem(url, DestinationError)
    try:
        fs.put_file(str(local), remote)
        info = fs.info(remote)
        if info["size"] != local.stat().st_size:
            raise OSError(f"{remote} holds {info['size']} of {local.stat().st_size} bytes")
        if info.get("md5Hash") and base64.b64decode(info["md5Hash"]) != _md5(local):
            raise OSError(f"{remote} does not hold the bytes that were sent: its MD5 differs")
    except Exception as error:
        raise DestinationError(f"{url}: upload failed ({cause_of(error)}); the export is not published") from error


def _md5(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).digest()


def _take_back(claim: _Claim, names: list[str]) -> list[str]:
    """Delete what was put, last first, then the marker; returns what could not be deleted.

    Where a file that loaders start from cannot be deleted, the rest stays too: it is whole, or nothing.
    """
    names = [*reversed(names), MARKER]
    for number, name in enumerate(names):
        remote = f"{claim.root}/{name}"
        try:
            claim.fs.rm_file(remote)
        except FileNotFoundError:
            continue
        except Exception:
            return names[number:]
    return []
