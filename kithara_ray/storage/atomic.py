"""Write local files that readers find whole or not at all: under another name in the same directory, then renamed.

    write_atomic     bytes at hand
    AtomicFile       bytes as they arrive
    rename_durably   a file already written elsewhere in the same file system

An object store needs none of this: a put shows the whole object or nothing.
"""

import io
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self


def sync(path: Path) -> None:
    """fsync a file or a directory. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicFile(io.FileIO):
    """A binary file that gets its own name only when it is closed.

    An exception in a `with` block discards the new bytes and keeps the file that was there before.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self._path, self._unfinished = path, path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
        super().__init__(self._unfinished, "w")

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.replace(self._unfinished, self._path)

    def discard(self) -> None:
        """Close without publishing."""
        super().close()
        self._unfinished.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def __enter__(self) -> Self:
        return self


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write or overwrite a local file. On an error, raises OSError and keeps the old file."""
    with AtomicFile(path) as stream:
        view = memoryview(data)
        while view:
            view = view[stream.write(view) :]


def rename_durably(source: Path, target: Path) -> None:
    """Rename a finished file and force file and name onto the disk. Raises OSError."""
    sync(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)
    sync(target.parent)
    sync(target.parent.parent)
