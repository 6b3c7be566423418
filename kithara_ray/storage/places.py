"""The storage of checkpoints: a directory of directories of files, local or on an object store behind fsspec.

Each operation takes effect completely or not at all: a file gets its final name in one step. Readers need no lock.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kithara_ray.errors import DestinationError
from kithara_ray.storage.atomic import rename_durably
from kithara_ray.storage.objects import put_file
from kithara_ray.storage.scratch import scratch
from kithara_ray.storage.urls import cause_of, filesystem, is_url, join

logger = logging.getLogger(__name__)

# An object store answers one request in a thousand with an error; a run that lasts days meets many.
_ATTEMPTS = 4
_FIRST_PAUSE_S = 0.5


@dataclass(frozen=True)
class Place:
    """A local directory or a URL (`root`) that holds directories of files. It need not exist yet."""

    root: str

    @property
    def is_local(self) -> bool:
        return not is_url(self.root) or self.root.startswith("file://")

    @property
    def fs(self) -> Any:
        return filesystem(self.root, DestinationError)[0]

    def path(self, *parts: str) -> str:
        """Return the path in `fs`; a part "" is the root."""
        return "/".join([filesystem(self.root, DestinationError)[1], *filter(None, parts)])

    def url(self, *parts: str) -> str:
        return join(self.root, *filter(None, parts))

    # --- write -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a temporary directory for files to put. A local one is next to its destination: a rename is enough."""
        if not self.is_local:
            with scratch() as directory:
                yield directory
            return
        directory = Path(self.path(f".writing-{uuid.uuid4().hex[:8]}"))
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            raise DestinationError(f"{self.root} cannot be written ({cause_of(error)})") from error
        try:
            yield directory
        except OSError as error:
            raise DestinationError(f"{self.root} cannot be written ({cause_of(error)})") from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def put(self, local: Path, directory: str, name: str) -> None:
        """Put a local file there, durably. A local place moves the file. Raises DestinationError."""
        url = self.url(directory, name)
        if self.is_local:
            self._move(local, Path(self.path(directory)), name)
        else:
            self._again(lambda: put_file(local, self.url(directory), name), url)

    def put_bytes(self, data: bytes, directory: str, name: str) -> None:
        with self.scratch() as scratch:
            local = scratch / "file"
            local.write_bytes(data)
            self.put(local, directory, name)

    def _move(self, local: Path, directory: Path, name: str) -> None:
        try:
            rename_durably(local, directory / name)
        except OSError as error:
            raise DestinationError(f"{directory / name} cannot be written ({cause_of(error)})") from error

    def remove(self, directory: str, names: Sequence[str]) -> None:
        """Remove files in this order, then the directory. Raises DestinationError."""
        fs = self.fs
        for name in names:
            path = self.path(directory, name)
            with contextlib.suppress(FileNotFoundError):
                self._again(lambda path=path: fs.rm_file(path), self.url(directory, name))
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self.path(directory))

    def clear_scratch(self) -> None:
        """Remove files that killed writers left next to the checkpoints."""
        if self.is_local:
            for path in Path(self.path()).glob(".writing-*"):
                shutil.rmtree(path, ignore_errors=True)

    # --- read --------------------------------------------------------------------------------------------------------

    def directories(self) -> list[str]:
        return [name for name, is_file, _ in self._list() if not is_file]

    def files(self, directory: str) -> dict[str, int]:
        """Map the name of each file in a directory to its size in bytes."""
        return {name: size for name, is_file, size in self._list(directory) if is_file}

    def _list(self, *parts: str) -> list[tuple[str, bool, int]]:
        path = self.path(*parts)
        fs = self.fs
        try:
            found = self._again(lambda: fs.ls(path, detail=True), self.url(*parts))
        except (FileNotFoundError, NotADirectoryError):
            return []
        named = [(entry["name"].rstrip("/").rsplit("/", 1)[-1], entry) for entry in found]
        # A listing of "dir/" may hold the placeholder "dir/" itself.
        own = path.rstrip("/").rsplit("/", 1)[-1]
        return [
            (name, entry["type"] == "file", int(entry.get("size") or 0))
            for name, entry in named
            if name != own or entry["type"] != "file"
        ]

    def read(self, directory: str, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Read a file's bytes, or a range of them. Raises OSError."""
        fs, path = self.fs, self.path(directory, name)
        return self._again(lambda: fs.cat_file(path, start=start, end=stop), self.url(directory, name))

    def sha256(self, directory: str, name: str) -> str:
        """Return the SHA-256 of a whole file in hex, reading it in pieces. Raises OSError."""
        fs, path = self.fs, self.path(directory, name)

        def compute() -> str:
            with fs.open(path, "rb") as stream:
                digest = hashlib.sha256()
                while block := stream.read(1 << 22):
                    digest.update(block)
            return digest.hexdigest()

        return self._again(compute, self.url(directory, name))

    def _again(self, call: Callable[[], Any], what: str) -> Any:
        """Run `call`, and repeat it a few times in growing pauses if an object store fails.

        Raises DestinationError after the last attempt, or FileNotFoundError at once.
        """
        pause_s = _FIRST_PAUSE_S
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return call()
            except (FileNotFoundError, NotADirectoryError):
                raise
            except Exception as error:
                cause = error.__cause__ if isinstance(error, DestinationError) and error.__cause__ else error
                if attempt == _ATTEMPTS or self.is_local:
                    raise DestinationError(f"{what}: failed {attempt} time(s) ({cause_of(cause)})") from cause
                logger.warning("%s: failed (%s); trying again in %.1f s", what, cause_of(cause), pause_s)
                time.sleep(pause_s)
                pause_s *= 2
