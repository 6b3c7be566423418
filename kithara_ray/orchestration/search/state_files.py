"""A local file system on which a file is there when it is whole, for the state of a search.

Ray Tune writes its state over the one before. A process that is killed while it writes would leave half of it, and Ray
would begin such a search anew. Object stores show an object when it is whole.
"""

import io
import os
import secrets
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem


def whole_files() -> PyFileSystem:
    """For pyarrow, as Ray takes it."""
    return PyFileSystem(FSSpecHandler(WholeFiles()))


class WholeFiles(LocalFileSystem):
    """What is written has another name until it is closed."""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        return _Written(path) if mode == "wb" else super()._open(path, mode, block_size, **options)


class _Written(io.FileIO):
    def __init__(self, path: str):
        self._path, self._unfinished = path, f"{path}.{secrets.token_hex(4)}.unfinished"
        super().__init__(self._unfinished, "w")

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.replace(self._unfinished, self._path)
