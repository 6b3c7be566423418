"""Record which columns of the rows are read, so that messages can name the unread ones."""

from collections.abc import Iterable, Mapping
from typing import Any


class Columns:
    """The columns that hold values, and whether any row's value was read.

    Attributes:
        read: name -> whether it was read.
    """

    def __init__(self):
        self.read: dict[Any, bool] = {}

    def watched(self, row: Any) -> Any:
        """Return the row, wrapped so that it records each column that is read."""
        if type(row) is not dict:
            return row
        for name, value in row.items():
            if value is not None:
                self.read.setdefault(name, False)
        return _Watched(row, self.read)

    def found(self) -> tuple[tuple[str, bool], ...]:
        return tuple((str(name), read) for name, read in self.read.items())


class _Watched(dict):
    """A row that records its columns as they are read one by one."""

    def __init__(self, row: Mapping[Any, Any], read: dict[Any, bool]):
        super().__init__(row)
        self._read = read

    def __getitem__(self, name: Any) -> Any:
        value = super().__getitem__(name)
        self._note(name)
        return value

    def get(self, name: Any, default: Any = None) -> Any:
        self._note(name)
        return super().get(name, default)

    def _note(self, name: Any) -> None:
        if name in self._read:
            self._read[name] = True


def unread(found: Iterable[tuple[tuple[str, bool], ...]]) -> tuple[str, ...]:
    """The columns that nothing read, from the records of several Columns."""
    read: dict[str, bool] = {}
    for columns in found:
        for name, was_read in columns:
            read[name] = read.get(name, False) or was_read
    return tuple(name for name, was_read in read.items() if not was_read)
