"""A local file system for the state of a search, on which only complete files are visible.

Ray Tune overwrites its previous state. If the process is killed during the write, half a state is left, and Ray would
start the search from scratch. Object stores need none of this: they show an object only when it is complete.
"""

from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from kithara_ray.storage.atomic import AtomicFile


def whole_files() -> PyFileSystem:
    """Return the file system for pyarrow, as Ray expects it."""
    return PyFileSystem(FSSpecHandler(WholeFiles()))


class WholeFiles(LocalFileSystem):
    """A local file system that writes each file under a temporary name until the file is closed."""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        """Open a file; for writing, open one under a temporary name.

        Needed because this is the method that fsspec asks file systems to define; its public `open` calls it.
        """
        return AtomicFile(path) if mode == "wb" else super()._open(path, mode, block_size, **options)
