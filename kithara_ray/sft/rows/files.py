"""Files of rows, cut into pieces that are read by themselves; a row that cannot be read is known by file and line.

    .jsonl              a JSON object a line; cut at line ends
    .json               a list of objects, read whole, or what .jsonl is
    .csv                a header and rows, read whole
    .txt                a row a line, in column `text`; cut at line ends
    .parquet            cut at row groups
    .arrow, .feather    Arrow's file or stream format; a file cut at record batches

Paths are local or fsspec URLs: a file, a directory, a pattern with `*`, or a list of these.
"""

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from kithara_ray.errors import DataError

# Of text in a piece: small enough that a batch's rows do not drag much with them, large enough for a task.
PIECE_BYTES = 4 * 2**20
_READ_BYTES = 2**20
LINES = (".jsonl", ".txt")
KNOWN = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".feather", ".txt")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs"}


@dataclass(frozen=True)
class Piece:
    """Part of a file.

    Attributes:
        url: of the file.
        number: of the file among the source's.
        start, stop: bytes of a file of lines, to the end if -1; row groups or record batches; nothing of a file that is
            read whole.
        kind: how it is read, one of KNOWN.
        first_row, num_rows: rows before it in the file, and in it, where that is known without reading them.
    """

    url: str
    number: int
    kind: str
    start: int = 0
    stop: int = 0
    first_row: int = 0
    num_rows: int = 0

    @property
    def first_id(self) -> int:
        """Of its first row: unlike any other's in the source, and the same whoever reads it."""
        return (self.number << 44) + (self.start if self.kind in LINES else self.first_row)

    def load(self) -> Any:
        """What `rows` reads: bytes, or an Arrow table."""
        try:
            with fsspec.open(self.url, "rb", compression="infer") as file:
                if self.kind in LINES:
                    return _lines_of(file, self.start, self.stop)
                if self.kind == ".parquet":
                    return pq.ParquetFile(file).read_row_groups(range(self.start, self.stop))
                if self.kind in (".arrow", ".feather"):
                    return _arrow(file, self.start, self.stop)
                return file.read()
        except (OSError, pa.ArrowException, EOFError) as error:
            part = f", row group {self.start}" if self.kind == ".parquet" else ""
            raise DataError(f"{self.url}{part}: cannot be read: {_short(error)}") from error

    def rows(self, loaded: Any) -> Iterator[tuple[str, Any]]:
        """(its place, a row): a dict, or the exception that stands for it."""
        if self.kind == ".jsonl":
            return ((f"line {n}", _json(line)) for n, line in _numbered(loaded))
        if self.kind == ".txt":
            return ((f"line {n}", _text(line)) for n, line in _numbered(loaded))
        if self.kind == ".json":
            return ((f"row {n}", row) for n, row in enumerate(_json_list(loaded, self.url)))
        if self.kind == ".csv":
            return _csv(loaded)
        return ((f"row {self.first_row + n}", row) for n, row in enumerate(rows_of(loaded)))

    def lines_before(self) -> int:
        """Of a file of lines; reads all that stands before this piece."""
        if self.kind not in LINES or not self.start:
            return 0
        count, left = 1, self.start - 1  # the line that the byte before `start` belongs to ends before this piece
        with fsspec.open(self.url, "rb") as file:
            while left > 0 and (data := file.read(min(left, _READ_BYTES))):
                count, left = count + data.count(b"\n"), left - len(data)
        return count


def pieces(source: Any, piece_bytes: int | None = None) -> Iterator[Piece]:
    """The pieces of a path, URL, directory, pattern or list of these, in the order of the names.

    Raises:
        DataError: there is no such file, or it cannot be opened, or its kind is not known.
    """
    piece_bytes = piece_bytes or PIECE_BYTES
    for number, (url, size) in enumerate(_files(source)):
        kind = _kind(url)
        if kind == ".json" and not _is_list(url):
            kind = ".jsonl"
        packed = PurePosixPath(url).suffix != _suffix(url)
        if kind in LINES and not packed:
            for start in range(0, size, piece_bytes):
                yield Piece(url, number, kind, start, min(start + piece_bytes, size))
        elif kind in LINES:
            yield Piece(url, number, kind, 0, -1)
        elif kind == ".parquet":
            yield from _row_groups(url, number, piece_bytes)
        elif kind in (".arrow", ".feather"):
            yield from _record_batches(url, number)
        else:
            yield Piece(url, number, kind)


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """An Arrow table as dicts. Arrow gives all structs of a column the same fields, null where a row had none: in
    nested columns, such as messages and tools, fields that are null are left out again."""
    nested = [field.name for field in table.schema if pa.types.is_nested(field.type)]
    rows = table.to_pylist()
    for row in rows if nested else ():
        for name in nested:
            row[name] = _without_nulls(row[name])
    return rows


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# --- which files there are -------------------------------------------------------------------------------------------


def _files(source: Any) -> list[tuple[str, int]]:
    """(URL, bytes) of every file."""
    found = []
    for path in source if isinstance(source, (list, tuple)) else [source]:
        url = str(path)
        try:
            fs, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = _PACKAGES.get(url.split("://")[0])
            raise DataError(f"{url}: needs a package: pip install {package or error}") from error
        except ValueError as error:
            raise DataError(f"{url}: {_short(error)}") from error
        try:
            if "*" in root:
                names = sorted(name for name in fs.glob(root) if _suffix(name) in KNOWN)
            elif fs.isdir(root):
                names = sorted(name for name in fs.find(root) if _suffix(name) in KNOWN and not _is_hidden(name, root))
            else:
                _kind(url)
                names = [root]
            infos = [(fs.unstrip_protocol(name) if "://" in url else name, fs.size(name)) for name in names]
        except FileNotFoundError as error:
            raise DataError(f"{url}: no such file; give an existing path, a URL or a dataset") from error
        except OSError as error:
            raise DataError(f"{url}: cannot be opened: {_short(error)}") from error
        if not infos:
            raise DataError(f"{url}: holds no file of a known extension; known are {', '.join(KNOWN)}")
        found += infos
    return found


def _is_hidden(name: str, root: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(name.removeprefix(root)).parts if part != "/")


def _suffix(name: str) -> str:
    suffixes = PurePosixPath(name).suffixes
    if suffixes and suffixes[-1] in (".gz", ".bz2", ".xz", ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _kind(url: str) -> str:
    if (suffix := _suffix(url)) not in KNOWN:
        raise DataError(f"{url}: unknown extension {suffix!r}; known are {', '.join(KNOWN)}")
    return suffix


def _is_list(url: str) -> bool:
    with fsspec.open(url, "rb", compression="infer") as file:
        return file.read(4096).lstrip(b" \t\r\n" + codecs.BOM_UTF8)[:1] == b"["


# --- lines -----------------------------------------------------------------------------------------------------------


def _lines_of(file: Any, start: int, stop: int) -> bytes:
    """The lines that begin in bytes `start` to `stop`, whole."""
    if start:
        file.seek(start - 1)
    data = file.read(stop - max(start - 1, 0))
    if start:  # the line that the byte before belongs to is another piece's
        cut = data.find(b"\n")
        if cut < 0:
            return b""
        data = data[cut + 1 :]
    while data and not data.endswith(b"\n") and (more := file.read(_READ_BYTES)):
        cut = more.find(b"\n")
        data += more[: cut + 1] if cut >= 0 else more
        if cut >= 0:
            break
    return data


def _numbered(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their number in the piece, from 1."""
    return ((n, line) for n, line in enumerate(data.split(b"\n"), start=1) if line.strip())


def _decoded(line: bytes) -> str | Exception:
    try:
        return line.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        return ValueError(f"is not valid UTF-8 at byte {error.start}")


def _json(line: bytes) -> Any:
    text = _decoded(line)
    if isinstance(text, Exception):
        return text
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"is not JSON: {_short(error)}")
    return row if isinstance(row, dict) else ValueError(f"is {type(row).__name__}, not a JSON object")


def _text(line: bytes) -> Any:
    text = _decoded(line)
    return text if isinstance(text, Exception) else {"text": text.rstrip("\r")}


# --- whole files -----------------------------------------------------------------------------------------------------


def _json_list(data: bytes, url: str) -> Iterable[Any]:
    try:
        rows = json.loads(data.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url}: is not JSON: {_short(error)}") from error
    return (row if isinstance(row, dict) else ValueError(f"is {type(row).__name__}, not an object") for row in rows)


def _csv(data: bytes) -> Iterator[tuple[str, Any]]:
    # What is not UTF-8 becomes lone surrogates, which the format finds in the column that has them.
    text = io.StringIO(data.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape"), newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, [])
        while True:
            line = reader.line_num + 1
            values = next(reader, None)
            if values is None:
                return
            if len(values) == len(header):
                yield f"line {line}", dict(zip(header, values, strict=True))
            elif values:
                yield f"line {line}", ValueError(f"has {len(values)} fields, the header has {len(header)}")
    except csv.Error as error:  # what follows cannot be told apart
        yield f"line {reader.line_num}", ValueError(f"is not CSV: {error}")


# --- Arrow -----------------------------------------------------------------------------------------------------------


def _row_groups(url: str, number: int, piece_bytes: int) -> Iterator[Piece]:
    try:
        with fsspec.open(url, "rb") as file:
            metadata = pq.ParquetFile(file).metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{url}: cannot be read as Parquet: {_short(error)}") from error
    first = start = rows = size = 0
    for i, (count, num_bytes) in enumerate(sizes):
        rows, size = rows + count, size + num_bytes
        if size >= piece_bytes or i == len(sizes) - 1:
            yield Piece(url, number, ".parquet", start, i + 1, first, rows)
            first, start, rows, size = first + rows, i + 1, 0, 0


def _record_batches(url: str, number: int) -> Iterator[Piece]:
    try:
        with fsspec.open(url, "rb") as file:
            if file.read(6) != b"ARROW1":
                yield Piece(url, number, ".arrow")
                return
            file.seek(0)
            reader = pa.ipc.open_file(file)
            counts = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{url}: cannot be read as Arrow: {_short(error)}") from error
    first = 0
    for i, count in enumerate(counts):
        yield Piece(url, number, ".arrow", i, i + 1, first, count)
        first += count


def _arrow(file: Any, start: int, stop: int) -> pa.Table:
    if stop == 0:
        return pa.ipc.open_stream(file).read_all()
    reader = pa.ipc.open_file(file)
    return pa.Table.from_batches([reader.get_batch(i) for i in range(start, stop)], reader.schema)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def as_sequence(source: Any) -> Sequence[str] | None:
    """A list of paths, if that is what it is."""
    is_list = isinstance(source, (list, tuple)) and len(source) > 0
    return [str(path) for path in source] if is_list and all(_is_path(path) for path in source) else None


def _is_path(value: Any) -> bool:
    return isinstance(value, str) or hasattr(value, "__fspath__")
