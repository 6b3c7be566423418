"""Source rows to checked text: which columns hold it, how it is formatted first, and what makes a row bad.

A row is a dict of column name to value. A format reads it into `{expected column: text}` or raises a DataError that
names the row, the column, what was found and what to do. `where` says which row it is: "line 18 of train.jsonl", or its
number in the source, from 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.tokens.chat import check_messages, check_tools

REMEDY = 'drop it or pass on_bad_row="skip"'
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
    optional: ClassVar[tuple[str, ...]] = ()
    may_be_empty: ClassVar[tuple[str, ...]] = ()
    # Columns of which a row's own value is a list, of dicts.
    lists: ClassVar[tuple[str, ...]] = ()

    column_mapping: Mapping[str, str] = field(default_factory=dict)
    custom_formatting_fn: Callable[[dict], dict] | None = None
    formatting_style: str = "auto"

    def __post_init__(self):
        self.column_mapping = dict(self.column_mapping or {})
        for expected in self.column_mapping:
            if expected not in (known := self.columns + self.optional):
                raise ConfigError(
                    f"column_mapping maps {expected!r}, but the expected columns are {_names(known)}; it goes "
                    f'from expected name to source column, e.g. {{"{self.columns[0]}": "<the column that holds it>"}}'
                )
        if self.custom_formatting_fn is not None and not callable(self.custom_formatting_fn):
            raise ConfigError(f"custom_formatting_fn must be callable, got {type(self.custom_formatting_fn).__name__}")
        if self.formatting_style not in FORMATTING_STYLES:
            raise ConfigError(f"formatting_style must be one of {FORMATTING_STYLES}, got {self.formatting_style!r}")

    def read(self, row: Mapping[str, Any], where: Any) -> dict[str, Any]:
        """The row's text by expected column name. Raises DataError for a bad row.

        `where`: a number, or what says where the row is when it is written into a message.
        """
        where = f"row {where}" if isinstance(where, int) else where
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected a dict of columns, got {type(row).__name__}")
        if self.custom_formatting_fn is not None:
            row = self._formatted(row, where)
        return self._read(row, where)

    def _read(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {column: self._text(row, column, where) for column in self.columns}

    def source_column(self, column: str) -> str:
        return self.column_mapping.get(column, column)

    def _text(self, row: Mapping[str, Any], column: str, where: str) -> str:
        source = self.source_column(column)
        column_where = f"{where}: column {source!r}"
        if source not in row:
            raise DataError(
                f"{where}: no column {source!r}, found {_names(row)}; "
                f'pass column_mapping={{"{column}": "<the column that holds it>"}}'
            )
        value = row[source]
        if value is None or (isinstance(value, float) and value != value):  # a null of Arrow, or of pandas
            raise DataError(f"{column_where} is null; {REMEDY}")
        if not isinstance(value, str):
            raise DataError(
                f"{column_where} is {type(value).__name__}, not text; convert it in custom_formatting_fn, or {REMEDY}"
            )
        if not value.strip() and column not in self.may_be_empty:
            raise DataError(f"{column_where} is {'blank' if value else 'empty'}; {REMEDY}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which tokenizers refuse with less to go by
            raise DataError(f"{column_where} is not valid Unicode at character {error.start}; {REMEDY}") from error
        return str(value)

    def _formatted(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        if self.formatting_style == "row":
            return self._as_row(row, where)
        if self.formatting_style == "batch":
            return self._as_batch(row, where)

        failures = []
        for style, attempt in (("row", self._as_row), ("batch", self._as_batch)):
            try:
                result = attempt(row, where)
            except DataError as error:
                failures.append(error)
            else:
                self.formatting_style = style
                return result
        raise DataError(f"{failures[0]} (nor as a batch of one: {failures[1]})") from failures[0]

    def _as_row(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        result = self._call(dict(row), "the row", where)
        for column in self._wanted(result):
            if self._is_batch(column, result[column]):
                raise DataError(
                    f"{where}: custom_formatting_fn, given the row, returned a list for column {column!r}; "
                    f'return text, or pass formatting_style="batch"'
                )
        return result

    def _as_batch(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        result = self._call({name: [value] for name, value in row.items()}, "a batch of one", where)
        one = {}
        for column in self._wanted(result):
            if not self._is_batch(column, result[column]) or len(result[column]) != 1:
                found = f"{len(result[column])} values" if _is_list(result[column]) else type(result[column]).__name__
                raise DataError(
                    f"{where}: custom_formatting_fn, given a batch of one, returned {found} for column "
                    f"{column!r}; return a list of one value a row"
                )
            one[column] = result[column][0]
        return one or dict(result)

    def _call(self, argument: dict, what: str, where: str) -> Mapping[str, Any]:
        try:
            result = self.custom_formatting_fn(argument)
        except Exception as error:  # the user's code: whatever it raises belongs to this row
            raise DataError(
                f"{where}: custom_formatting_fn, given {what}, raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(result, Mapping):
            raise DataError(
                f"{where}: custom_formatting_fn, given {what}, returned {type(result).__name__}, not a dict"
            )
        return result

    def _wanted(self, result: Mapping[str, Any]) -> list[str]:
        return [name for name in map(self.source_column, self.columns + self.optional) if name in result]

    def _is_batch(self, source: str, value: Any) -> bool:
        """Whether a column's value is a list of a batch's values, and not one row's own."""
        lists = map(self.source_column, self.lists)
        return _is_list(value) and (source not in lists or not len(value) or not isinstance(value[0], Mapping))


@dataclass
class PromptAnswer(_Format):
    """Columns `prompt` and `answer`: the answer is learned. A prompt may be empty, an answer may not.

    Or a conversation: a row with a column `messages`, and no prompt, of which the assistant's messages are learned. It
    may have `tools`, JSON schemas or JSON text, and `chat_template_kwargs`, a dict of further variables for the
    template.
    """

    columns: ClassVar[tuple[str, ...]] = ("prompt", "answer")
    optional: ClassVar[tuple[str, ...]] = ("messages", "tools", "chat_template_kwargs")
    may_be_empty: ClassVar[tuple[str, ...]] = ("prompt",)
    lists: ClassVar[tuple[str, ...]] = ("messages", "tools")

    def _read(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        source = self.source_column("messages")
        if "messages" not in self.column_mapping and (source not in row or self.source_column("prompt") in row):
            return super()._read(row, where)
        if source not in row:
            raise DataError(f"{where}: no column {source!r}, found {_names(row)}; change column_mapping")
        tools, options = (row.get(self.source_column(name)) for name in ("tools", "chat_template_kwargs"))
        conversation = {}
        for column, value, check in (("messages", row[source], check_messages), ("tools", tools, check_tools)):
            if value is None and column == "messages":
                raise DataError(f"{where}: column {source!r} is null; {REMEDY}")
            try:
                conversation[column] = check(value)
            except DataError as error:
                raise DataError(f"{where}: column {self.source_column(column)!r} {error}; {REMEDY}") from error
        if options is not None and not isinstance(options, Mapping):
            raise DataError(f"{where}: column 'chat_template_kwargs' is {type(options).__name__}, not a dict")
        return conversation | {"options": options}


@dataclass
class Text(_Format):
    """Column `text`: all of it is learned."""

    columns: ClassVar[tuple[str, ...]] = ("text",)


def _is_list(value: Any) -> bool:
    """A list, tuple, numpy array or Arrow array: anything sized that is neither text nor a dict."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, Mapping))


def _names(names) -> str:
    return ", ".join(repr(name) for name in names) or "none"
