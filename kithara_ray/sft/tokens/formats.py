"""Convert source rows to checked text: choose the columns, format the row first if asked, and refuse bad rows.

A row is a dict of column name to value. A format reads it into `{expected column: text}` or raises a DataError. The
error names the row, the column, the value found and the remedy. `where` identifies the row: "line 18 of train.jsonl",
or its number in the source, from 0.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.tokens import conversions
from kithara_ray.sft.tokens.conversions import FORMATS, InColumn, is_null

REMEDY = 'drop it or pass on_bad_row="skip"'
WEIGHT = "column 'weight' has no effect: every row counts the same"
FORMATTING_STYLES = ("auto", "row", "batch")
# Formats that are recognised by their columns, in this order, for rows without both prompt and answer.
_DETECTED = ("messages", "prompt_completion", "sharegpt", "alpaca")
# Formats whose rows need no conversion.
_PLAIN = ("prompt_answer", "messages")


@dataclass
class _Format:
    """Text columns of a source.

    column_mapping: expected column name -> the source's column name, e.g. `{"prompt": "question"}`. Columns left out
        keep their expected name. It is applied to what `custom_formatting_fn` returns.
    custom_formatting_fn: called on every source row before anything else. It has one of two styles: "row" maps a dict
        of values to a dict of values, "batch" a dict of lists to a dict of lists. A batch function always receives one
        row and must return one, so its result does not depend on how the source is divided.
    formatting_style: "auto" chooses between the two once, on the source's first row that decides it, and keeps the
        choice for all rows:
        1. the function is called with the row; if it returns a dict in which no wanted column is a list, it is "row";
        2. otherwise it is called with the row as a batch of one; if it returns a dict in which every wanted column is a
           list, it is "batch";
        3. otherwise this row is bad and the next one decides.
        A function that fits both, such as one that only renames columns, is "row". A batch function that indexes `[0]`
        and returns plain values looks like a row function, so let it return lists.
    format: one of `formats`, or "auto", which goes by the columns of each row.
    """

    formats: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    # Columns whose value in a single row is a list, of dicts or of lists of texts.
    lists: ClassVar[tuple[str, ...]] = ()

    column_mapping: Mapping[str, str] = field(default_factory=dict)
    custom_formatting_fn: Callable[[dict], dict] | None = None
    formatting_style: str = "auto"
    format: str = "auto"

    def __post_init__(self):
        self.column_mapping = dict(self.column_mapping or {})
        if self.format not in (choices := ("auto", *self.formats)):
            raise ConfigError(f"format must be one of {_names(choices)}, got {self.format!r}")
        for expected in self.column_mapping:
            if expected not in (known := self._known_columns()):
                raise ConfigError(
                    f"column_mapping maps {expected!r}, but the expected columns are {_names(known)}; it goes "
                    f'from expected name to source column, e.g. {{"{self.columns[0]}": "<the column that holds it>"}}'
                )
        if self.custom_formatting_fn is not None and not callable(self.custom_formatting_fn):
            raise ConfigError(f"custom_formatting_fn must be callable, got {type(self.custom_formatting_fn).__name__}")
        if self.formatting_style not in FORMATTING_STYLES:
            raise ConfigError(f"formatting_style must be one of {FORMATTING_STYLES}, got {self.formatting_style!r}")

    def read(self, row: Mapping[str, Any], where: Any) -> dict[str, Any]:
        """Return the row's text by expected column name. Raises DataError for a bad row.

        The result may also hold `format`, the name of the format from which the row was converted, and `notes`, remarks
        on the row.

        `where`: a number, or an object whose text in a message is the place of the row.
        """
        where = f"row {where}" if isinstance(where, int) else where
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected a dict of columns, got {type(row).__name__}")
        if self.custom_formatting_fn is not None:
            row = self._formatted(row, where)
        read, weight = self._read(row, where), _peek(row, "weight")
        if is_null(weight) or weight == 1 or "weight" in self.column_mapping.values():
            return read
        return read | {"notes": (WEIGHT,)}

    def _read(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {column: self._text(row, column, where) for column in self.columns}

    def _known_columns(self) -> tuple[str, ...]:
        return self.columns + self.optional

    @property
    def is_undecided(self) -> bool:
        """True until a row decides the formatting style."""
        return self.custom_formatting_fn is not None and self.formatting_style == "auto"

    def source_column(self, column: str) -> str:
        return self.column_mapping.get(column, column)

    def _text(self, row: Mapping[str, Any], column: str, where: str, may_be_empty: Sequence[str] = ()) -> str:
        source = self.source_column(column)
        column_where = f"{where}: column {source!r}"
        if source not in row:
            raise DataError(
                f"{where}: no column {source!r}, found {_names(row)}; "
                f'pass column_mapping={{"{column}": "<the column that holds it>"}}'
            )
        value = row[source]
        if is_null(value):
            raise DataError(f"{column_where} is null; {REMEDY}")
        if not isinstance(value, str):
            raise DataError(
                f"{column_where} is {type(value).__name__}, not text; convert it in custom_formatting_fn, or {REMEDY}"
            )
        if not value.strip() and column not in may_be_empty:
            raise DataError(f"{column_where} is {'blank' if value else 'empty'}; {REMEDY}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, for which tokenizers give a poorer message
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
        assert self.custom_formatting_fn is not None
        try:
            result = self.custom_formatting_fn(argument)
        except Exception as error:  # the user's code, so any error belongs to this row
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
        """Return True if a column's value is a list of a batch's values, and not the value of one row."""
        if source in map(self.source_column, self.lists) and isinstance(value, (list, tuple)) and value:
            return not isinstance(value[0], Mapping) and not _is_turn(value[0])
        return _is_list(value)


@dataclass
class PromptAnswer(_Format):
    """A prompt and an answer, with the answer trained; or a conversation, with the assistant's messages trained.

    `conversions.FORMATS` lists the formats and their columns. Without `format`, the columns of a row decide:
    1. `messages`, if column_mapping names them;
    2. `prompt_answer`, if it has both columns; `prompt_completion`, if either of the two is a list of messages;
    3. the first of `messages`, `prompt_completion`, `sharegpt`, `alpaca` whose columns it has.
    Null columns count as absent, because Arrow gives every row the columns of all rows.
    """

    formats: ClassVar[tuple[str, ...]] = tuple(FORMATS)
    columns: ClassVar[tuple[str, ...]] = ("prompt", "answer")
    optional: ClassVar[tuple[str, ...]] = ("messages", "tools", "chat_template_kwargs")
    lists: ClassVar[tuple[str, ...]] = (
        *("messages", "tools", "functions", "conversations", "prompt", "completion", "answer", "history"),
    )

    def _known_columns(self) -> tuple[str, ...]:
        if self.format == "auto":
            return tuple(dict.fromkeys(name for each in FORMATS.values() for name in (*each.columns, *each.optional)))
        return FORMATS[self.format].columns + FORMATS[self.format].optional

    def _wanted(self, result: Mapping[str, Any]) -> list[str]:
        """The columns to check; those of other formats only in a row that has such a format."""
        if self.format == "auto" and self.detected(result) in ("prompt_answer", "messages"):
            return super()._wanted(result)
        return [name for name in map(self.source_column, self._known_columns()) if name in result]

    def detected(self, row: Mapping[str, Any]) -> str:
        """The format of a row by its columns."""

        def has(*columns: str) -> bool:
            return all(not is_null(_peek(row, self.source_column(column))) for column in columns)

        if "messages" in self.column_mapping:
            return "sharegpt" if conversions.is_sharegpt(_peek(row, self.source_column("messages"))) else "messages"
        others = [name for name in _DETECTED if has(*FORMATS[name].columns)]
        prompt, answer = (self.source_column(column) for column in self.columns)
        if prompt in row and answer in row and (has("prompt") or has("answer") or not others):
            is_chat = _is_messages(_peek(row, prompt)) or _is_messages(_peek(row, answer))
            return "prompt_completion" if is_chat else "prompt_answer"
        if others:
            return others[0]
        return "messages" if self.source_column("messages") in row and prompt not in row else "prompt_answer"

    def _read(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        name = self.detected(row) if self.format == "auto" else self.format
        conversion, sources = FORMATS[name], self._sources(name, row)
        for column in conversion.columns:
            if column not in conversion.texts and sources[column] not in row:
                remedy = "change column_mapping" if column in self.column_mapping else "give another format"
                raise DataError(f"{where}: no column {sources[column]!r}, found {_names(row)}; {remedy}")
            if column not in conversion.texts and is_null(_peek(row, sources[column])):
                raise DataError(f"{where}: column {sources[column]!r} is null; {REMEDY}")
        cells = {column: row[source] for column, source in sources.items() if source in row}
        for column in conversion.texts:
            cells[column] = self._text(row, column, where, conversion.may_be_empty)
        try:
            read = conversion.convert(cells)
        except DataError as error:
            column = error.column if isinstance(error, InColumn) else conversion.columns[0]
            raise DataError(f"{where}: column {sources.get(column, column)!r} {error}; {REMEDY}") from error
        if name == "prompt_completion" and "answer" in read:
            mapped = sources["completion"] == self.source_column("completion")
            read["prompt"] = self._text(row, "prompt", where, ("prompt",))
            read["answer"] = self._text(row, "completion" if mapped else "answer", where)
        return read if name in _PLAIN else read | {"format": name}

    def _sources(self, name: str, row: Mapping[str, Any]) -> dict[str, str]:
        """Map the format's columns to the row's; messages may be in a column of another name."""
        conversion = FORMATS[name]
        sources = {column: self.source_column(column) for column in conversion.columns + conversion.optional}
        sources |= {column: column for column in conversions.MEDIA if name not in ("prompt_answer", "alpaca_text")}
        if self.format == "auto" and name == "sharegpt" and "messages" in self.column_mapping:
            sources["conversations"] = self.source_column("messages")
        if self.format == "auto" and name == "prompt_completion" and sources["completion"] not in row:
            sources["completion"] = self.source_column("answer")
        return sources


@dataclass
class Text(_Format):
    """Column `text`, all of which is trained."""

    formats: ClassVar[tuple[str, ...]] = ("text",)
    columns: ClassVar[tuple[str, ...]] = ("text",)


def _peek(row: Mapping[str, Any], column: str) -> Any:
    """Return a cell without recording that it was read."""
    return dict.get(row, column) if isinstance(row, dict) else row.get(column)


def _is_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Mapping)


def _is_turn(value: Any) -> bool:
    """Return True for a turn of `history`, [instruction, output]."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _is_list(value: Any) -> bool:
    """Return True for a list, tuple, numpy or Arrow array: anything sized that is neither text nor a dict."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, Mapping))


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
