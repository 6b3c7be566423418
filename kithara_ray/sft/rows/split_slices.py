"""Slices of a split, written as Hugging Face datasets writes them: `train[:10%]`, `train[-500:]`, `train[20%:30%]`."""

import re
from dataclasses import dataclass

from kithara_ray.errors import DataError

_SLICED = re.compile(r"(?P<split>[^\[\]]*)\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\]")


@dataclass(frozen=True)
class RowSlice:
    """A slice of rows; a bound is a number of rows or a percentage, counted from the end if negative.

    None is the first row or the end. A percentage is rounded to the nearest row, as datasets does by default.
    """

    begin: str | None
    end: str | None

    def of(self, rows: int) -> range:
        """Return the row numbers of the slice of `rows` rows."""
        begin, end = (_absolute(bound, rows) for bound in (self.begin, self.end))
        return range(rows)[begin:end]

    def __str__(self) -> str:
        return f"[{self.begin or ''}:{self.end or ''}]"


def parsed(split: str | None) -> tuple[str | None, RowSlice | None]:
    """Divide a split into its name and its slice, if any.

    Raises:
        DataError: the text after the name is no slice, or its bounds have two units.
    """
    if split is None or not re.search(r"[\[\]]", split):
        return split, None
    if (found := _SLICED.fullmatch(split)) is None:
        raise DataError(f"split={split!r} is no slice of a split; write train[:10%], train[100:200] or train[-50:]")
    if len({bound.endswith("%") for bound in (found["begin"], found["end"]) if bound}) > 1:
        raise DataError(f"split={split!r} has a bound in percent and one in rows; give both in one unit")
    return found["split"] or None, RowSlice(found["begin"], found["end"])


def _absolute(bound: str | None, rows: int) -> int | None:
    if bound is None or not bound.endswith("%"):
        return None if bound is None else int(bound)
    return round(int(bound.removesuffix("%")) * rows / 100)
