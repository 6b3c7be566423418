"""Read rows of text: JSON objects, lines and delimited fields; each row knows its line."""

import codecs
import csv
import io
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

from kithara_ray.errors import DataError
from kithara_ray.sft.rows.values import RepeatedKey, check_names, read_json, short

# The csv module has one limit on field length for the whole process.
_CSV_LOCK = threading.Lock()
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # the elements of a JSON list


def numbered(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the non-blank lines with their number in the piece, from 1."""
    return ((n, line) for n, line in enumerate(data.split(b"\n"), start=1) if line.strip())


def json_row(line: bytes) -> Any:
    """Return the object that a line holds, or the ValueError in its place."""
    text = _decoded(line)
    if isinstance(text, Exception):
        return text
    try:
        row = read_json(text)
    except RepeatedKey as error:
        return error
    except ValueError as error:
        return ValueError(f"is not JSON: {short(error)}")
    return row if isinstance(row, dict) else ValueError(f"is {type(row).__name__}, not a JSON object")


def text_row(line: bytes) -> Any:
    """Return a line as column `text`, or the ValueError in its place."""
    text = _decoded(line)
    return text if isinstance(text, Exception) else {"text": text.rstrip("\r")}


def _decoded(line: bytes) -> str | Exception:
    try:
        return line.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        return ValueError(f"is not valid UTF-8 at byte {error.start}")


def json_list(data: bytes) -> list[Any]:
    """Return a JSON list's objects, with a ValueError for any other item. Raises DataError: the text is not JSON."""
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
        try:
            rows = read_json(text)
        except RepeatedKey:  # find the row
            rows = _one_by_one(text)
    except ValueError as error:
        raise DataError(f"is not JSON: {short(error)}") from error
    return [
        row if isinstance(row, (dict, ValueError)) else ValueError(f"is {type(row).__name__}, not an object")
        for row in rows
    ]


def _after(pattern: re.Pattern, text: str, at: int) -> int:
    """Return the place in valid JSON after a pattern, which matches at `at`."""
    found = pattern.match(text, at)
    assert found is not None, text[at : at + 20]
    return found.end()


def _one_by_one(text: str) -> list[Any]:
    """Read the elements of a JSON list one by one. Raises ValueError: the list is not JSON."""
    json.loads(text)
    decoder, rows, at = json.JSONDecoder(), [], text.index("[") + 1
    while text[at := _after(_BETWEEN, text, at)] != "]":
        _, stop = decoder.raw_decode(text, at)
        try:
            rows.append(read_json(text[at:stop]))
        except RepeatedKey as error:
            rows.append(error)
        at = stop
    return rows


def delimited(data: bytes, delimiter: str) -> list[tuple[str, Any]]:
    """Return (line, row) pairs of a CSV or TSV file with a header. Each line is in a row, or in the ValueError of one.

    A quoted field may span several lines. If such a row turns out to be bad, each of its lines counts as a bad row.
    Nothing shows which of them were meant to be rows.

    Raises:
        DataError: the header names a column twice.
    """
    # Bytes that are not UTF-8 become lone surrogates, which the format finds in their column.
    text = io.StringIO(data.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape"), newline="")
    with _CSV_LOCK:
        limit = csv.field_size_limit(len(data) + 1)
        try:
            return list(_records(csv.reader(text, delimiter=delimiter, strict=True)))
        finally:
            csv.field_size_limit(limit)


def _records(reader: Any) -> Iterator[tuple[str, Any]]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise DataError(f"the header is not CSV: {error}") from error
    while header and not header[-1].strip():  # spreadsheets end lines with empty fields
        header.pop()
    check_names(header)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield from _bad(line, reader.line_num, f"is not CSV: {_why(error)}")
            continue
        if values is None:
            return
        if len(values) > len(header) and not any(value.strip() for value in values[len(header) :]):
            del values[len(header) :]
        if len(values) == len(header):
            yield f"line {line}", dict(zip(header, values, strict=True))
        elif values:
            yield from _bad(line, reader.line_num, f"has {len(values)} fields, the header has {len(header)}")


def _bad(first: int, last: int, why: str) -> Iterator[tuple[str, ValueError]]:
    rest = f" (the row goes on to line {last})" if last > first else ""
    return ((f"line {line}", ValueError(why + rest)) for line in range(first, max(first, last) + 1))


def _why(error: csv.Error) -> str:
    if "expected after" in str(error):
        return "text follows a closing quote; write a quote inside a field twice"
    return "a quote is never closed" if "unexpected end" in str(error) else str(error)
