"""A local file system that shows whole files only, for the state of a search.

Ray Tune writes its state over the one before. A process that is killed while it writes would leave half of it, and Ray
would begin such a search anew. Object stores show an object when it is whole.
"""

from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from kithara_ray.storage.atomic import AtomicFile


def whole_files() -> PyFileSystem:
    """For pyarrow, as Ray takes it."""
    return PyFileSystem(FSSpecHandler(WholeFiles()))


class WholeFiles(LocalFileSystem):
    """What is written has another name until it is closed."""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        """A file of another name where one is written.

        Needed because this is the method that fsspec asks file systems to define; its public `open` calls it.
        """
        return AtomicFile(path) if mode == "wb" else super()._open(path, mode, block_size, **options)
