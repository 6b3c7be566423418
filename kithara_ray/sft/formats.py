"""Source rows to checked text: which columns hold it, how it is formatted first, and what makes a row bad.

A row is a dict of column name to value. A format reads it into `{expected column: text}` or raises a DataError that
names the row, the column, what was found and what to do. `row_index` is the row's place in the source, from 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kithara_ray.errors import ConfigError, DataError

FORMATTING_STYLES = ("auto", "row", "batch")


@dataclass
class _Format:
    """Text columns of a source.

    column_mapping: expected column name -> the source's column name, e.g. `{"prompt": "question"}`. Columns left out
        keep their expected name. It is applied to what `custom_formatting_fn` returns.
    custom_formatting_fn: called on every source row before anything else. It is written in one of two styles:
        "row", a dict of values to a dict of values, or "batch", a dict of lists to a dict of lists. A batch function is
        always given batches of one row, so its result does not depend on how the source is divided, and it must return
        one row.
    formatting_style: "auto" decides between the two once, on the first row that tells, and keeps to it:
        1. the function is called with the row; if it returns a dict in which no wanted column is a list, it is "row";
        2. otherwise it is called with the row as a batch of one; if it returns a dict in which every wanted column is a
           list, it is "batch";
        3. otherwise this row is bad and the next one decides.
        A function that fits both, such as one that only renames columns, is "row". One that indexes `[0]` and returns
        plain values cannot be told from a row function: return lists.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    may_be_empty: ClassVar[tuple[str, ...]] = ()

    column_mapping: Mapping[str, str] = field(default_factory=dict)
    custom_formatting_fn: Callable[[dict], dict] | None = None
    formatting_style: str = "auto"

    def __post_init__(self):
        self.column_mapping = dict(self.column_mapping or {})
        for expected in self.column_mapping:
            if expected not in self.columns:
                raise ConfigError(
                    f"column_mapping maps {expected!r}, but the expected columns are {_names(self.columns)}; it goes "
                    f'from expected name to source column, e.g. {{"{self.columns[0]}": "<the column that holds it>"}}'
                )
        if self.custom_formatting_fn is not None and not callable(self.custom_formatting_fn):
            raise ConfigError(f"custom_formatting_fn must be callable, got {type(self.custom_formatting_fn).__name__}")
        if self.formatting_style not in FORMATTING_STYLES:
            raise ConfigError(f"formatting_style must be one of {FORMATTING_STYLES}, got {self.formatting_style!r}")

    def read(self, row: Mapping[str, Any], row_index: int) -> dict[str, str]:
        """The row's text by expected column name. Raises DataError for a bad row."""
        if not isinstance(row, Mapping):
            raise DataError(f"row {row_index}: expected a dict of columns, got {type(row).__name__}")
        if self.custom_formatting_fn is not None:
            row = self._formatted(row, row_index)
        return {column: self._text(row, column, row_index) for column in self.columns}

    def source_column(self, column: str) -> str:
        return self.column_mapping.get(column, column)

    def _text(self, row: Mapping[str, Any], column: str, row_index: int) -> str:
        source = self.source_column(column)
        where = f"row {row_index}: column {source!r}"
        remedy = 'drop it or pass on_bad_row="skip"'
        if source not in row:
            raise DataError(
                f"row {row_index}: no column {source!r}, found {_names(row)}; "
                f'pass column_mapping={{"{column}": "<the column that holds it>"}}'
            )
        value = row[source]
        if value is None or (isinstance(value, float) and value != value):  # a null of Arrow, or of pandas
            raise DataError(f"{where} is null; {remedy}")
        if not isinstance(value, str):
            raise DataError(
                f"{where} is {type(value).__name__}, not text; convert it in custom_formatting_fn, or {remedy}"
            )
        if not value.strip() and column not in self.may_be_empty:
            raise DataError(f"{where} is {'blank' if value else 'empty'}; {remedy}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which tokenizers refuse with less to go by
            raise DataError(f"{where} is not valid Unicode at character {error.start}; {remedy}") from error
        return str(value)

    def _formatted(self, row: Mapping[str, Any], row_index: int) -> Mapping[str, Any]:
        if self.formatting_style == "row":
            return self._as_row(row, row_index)
        if self.formatting_style == "batch":
            return self._as_batch(row, row_index)

        failures = []
        for style, attempt in (("row", self._as_row), ("batch", self._as_batch)):
            try:
                result = attempt(row, row_index)
            except DataError as error:
                failures.append(error)
            else:
                self.formatting_style = style
                return result
        raise DataError(f"{failures[0]} (nor as a batch of one: {failures[1]})") from failures[0]

    def _as_row(self, row: Mapping[str, Any], row_index: int) -> Mapping[str, Any]:
        result = self._call(dict(row), "the row", row_index)
        for column in self._wanted(result):
            if _is_list(result[column]):
                raise DataError(
                    f"row {row_index}: custom_formatting_fn, given the row, returned a list for column {column!r}; "
                    f'return text, or pass formatting_style="batch"'
                )
        return result

    def _as_batch(self, row: Mapping[str, Any], row_index: int) -> Mapping[str, Any]:
        result = self._call({name: [value] for name, value in row.items()}, "a batch of one", row_index)
        one = {}
        for column in self._wanted(result):
            if not _is_list(result[column]) or len(result[column]) != 1:
                found = f"{len(result[column])} values" if _is_list(result[column]) else type(result[column]).__name__
                raise DataError(
                    f"row {row_index}: custom_formatting_fn, given a batch of one, returned {found} for column "
                    f"{column!r}; return a list of one value a row"
                )
            one[column] = result[column][0]
        return one or dict(result)

    def _call(self, argument: dict, what: str, row_index: int) -> Mapping[str, Any]:
        try:
            result = self.custom_formatting_fn(argument)
        except Exception as error:  # the user's code: whatever it raises belongs to this row
            raise DataError(
                f"row {row_index}: custom_formatting_fn, given {what}, raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(result, Mapping):
            raise DataError(
                f"row {row_index}: custom_formatting_fn, given {what}, returned {type(result).__name__}, not a dict"
            )
        return result

    def _wanted(self, result: Mapping[str, Any]) -> list[str]:
        return [name for name in map(self.source_column, self.columns) if name in result]


@dataclass
class PromptAnswer(_Format):
    """Columns `prompt` and `answer`: the answer is learned. A prompt may be empty, an answer may not."""

    columns: ClassVar[tuple[str, ...]] = ("prompt", "answer")
    may_be_empty: ClassVar[tuple[str, ...]] = ("prompt",)


@dataclass
class Text(_Format):
    """Column `text`: all of it is learned."""

    columns: ClassVar[tuple[str, ...]] = ("text",)


def _is_list(value: Any) -> bool:
    """A list, tuple, numpy array or Arrow array: anything sized that is neither text nor a dict."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, Mapping))


def _names(names) -> str:
    return ", ".join(repr(name) for name in names) or "none"
