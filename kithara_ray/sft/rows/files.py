"""Cut files of rows into pieces that are read separately; errors name the file and line of an unreadable row.

    .jsonl              one JSON object per line; cut at line ends
    .json               a list of objects, read whole, or the same as .jsonl
    .csv, .tsv          a header and rows, read whole
    .txt                one row per line, in column `text`; cut at line ends
    .parquet            cut at row groups
    .arrow, .feather    Arrow's file or stream format; a file cut at record batches

Paths are local or fsspec URLs: a file, a directory, a pattern with `*`, or a list of these.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import infer_compression

from kithara_ray.errors import DataError
from kithara_ray.sft.rows import text
from kithara_ray.sft.rows.listing import PACKED, Choice, files_of, kind_of, suffix_of
from kithara_ray.sft.rows.reading import reading
from kithara_ray.sft.rows.values import missing_as_none, rows_of

# Bytes of text in a piece: small enough that the rows of a batch keep little else in memory, large enough for a task.
PIECE_BYTES = 4 * 2**20
_READ_BYTES = 2**20
LINES = (".jsonl", ".txt")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Piece:
    """Part of a file.

    Attributes:
        url: URL of the file.
        number: number of the file in the source.
        start, stop: range of bytes in a file of lines (to the end if -1), or of row groups or record batches; unused
            for a file that is read whole.
        kind: format of the file, one of `listing.KNOWN`.
        first_row, num_rows: rows before the piece in the file, and in the piece, if known without reading them.
        columns: the columns to read of an Arrow file; None reads all.
    """

    url: str
    number: int
    kind: str
    start: int = 0
    stop: int = 0
    first_row: int = 0
    num_rows: int = 0
    columns: tuple[str, ...] | None = None

    @property
    def first_id(self) -> int:
        """Id of the first row, unique in the source and the same for every reader."""
        return (self.number << 44) + (self.start if self.kind in LINES else self.first_row)

    def load(self) -> Any:
        """Read the piece for `rows`: bytes, or an Arrow table. Raises DataError."""
        part = f", row group {self.start}" if self.kind == ".parquet" else ""
        with reading(f"{self.url}{part}"), _open(self.url) as file:
            if self.kind in LINES:
                return _lines_of(file, self.start, self.stop)
            if self.kind == ".parquet":
                return pq.ParquetFile(file).read_row_groups(range(self.start, self.stop))
            if self.kind in (".arrow", ".feather"):
                table = _arrow(file, self.start, self.stop)
                return table if self.columns is None else table.select(list(self.columns))
            return file.read()

    def rows(self, loaded: Any) -> Iterator[tuple[str, Any]]:
        """Yield (place, row); the row is a dict, or the exception in its place.

        Raises:
            DataError: no row can be read, because a name appears twice in the header or the columns, or a list is
                damaged.
        """
        with reading(self.url):
            if self.kind in LINES:
                read = text.json_row if self.kind == ".jsonl" else text.text_row
                found = ((f"line {n}", read(line)) for n, line in text.numbered(loaded))
            elif self.kind in _DELIMITERS:
                found = iter(text.delimited(loaded, _DELIMITERS[self.kind]))
            else:
                rows = text.json_list(loaded) if self.kind == ".json" else rows_of(loaded)
                found = ((f"row {self.first_row + n}", row) for n, row in enumerate(rows))
        return ((place, missing_as_none(row)) for place, row in found)

    def lines_before(self) -> int:
        """Count the lines before this piece of a file of lines, by reading all of them."""
        if self.kind not in LINES or not self.start:
            return 0
        count, left = 1, self.start - 1  # the line that the byte before `start` belongs to ends before this piece
        with reading(self.url), _raw(self.url) as file:
            while left > 0 and (data := file.read(min(left, _READ_BYTES))):
                count, left = count + data.count(b"\n"), left - len(data)
        return count


def _raw(url: str) -> Any:
    """Open a file's own bytes, as a context that gives a binary stream."""
    return fsspec.open(url, "rb")


def _open(url: str) -> Any:
    """Raises ImportError: no decompressor is installed; fsspec would return the compressed bytes."""
    if PurePosixPath(url).suffix in PACKED and infer_compression(url) is None:
        raise ImportError(f"what unpacks {PurePosixPath(url).suffix}")
    return fsspec.open(url, "rb", compression="infer")


def pieces(source: Any, piece_bytes: int | None = None, choice: Choice | None = None) -> Iterator[Piece]:
    """Yield the pieces of a path, URL, directory, pattern or list of these, in the order of the names.

    Args:
        choice: the split and subset to read.

    Raises:
        DataError: a file does not exist, cannot be opened or has an unknown format; or there are several splits and
            none is chosen.
    """
    piece_bytes = piece_bytes or PIECE_BYTES
    for number, (url, size, columns) in enumerate(files_of(source, choice or Choice())):
        kind = kind_of(url)
        if kind == ".json" and not _is_list(url):
            kind = ".jsonl"
        packed = PurePosixPath(url).suffix != suffix_of(url)
        if kind in LINES and not packed:
            for start in range(0, size, piece_bytes):
                yield Piece(url, number, kind, start, min(start + piece_bytes, size))
        elif kind in LINES:
            yield Piece(url, number, kind, 0, -1)
        elif packed and kind in (".parquet", ".arrow", ".feather"):
            raise DataError(f"{url}: {kind} files have a compression of their own; unpack it")
        elif kind == ".parquet":
            yield from _row_groups(url, number, piece_bytes)
        elif kind in (".arrow", ".feather"):
            yield from (replace(piece, columns=columns) for piece in _record_batches(url, number))
        else:
            yield Piece(url, number, kind)


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def _is_list(url: str) -> bool:
    with reading(url), _open(url) as file:
        return file.read(4096).lstrip(b" \t\r\n" + codecs.BOM_UTF8)[:1] == b"["


# --- lines -----------------------------------------------------------------------------------------------------------


def _lines_of(file: Any, start: int, stop: int) -> bytes:
    """Return the whole lines that begin in bytes `start` to `stop`."""
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


# --- Arrow -----------------------------------------------------------------------------------------------------------


def _row_groups(url: str, number: int, piece_bytes: int) -> Iterator[Piece]:
    with reading(url, "cannot be read as Parquet"), _raw(url) as file:
        metadata = pq.ParquetFile(file).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    first = start = rows = size = 0
    for i, (count, num_bytes) in enumerate(sizes):
        rows, size = rows + count, size + num_bytes
        if size >= piece_bytes or i == len(sizes) - 1:
            yield Piece(url, number, ".parquet", start, i + 1, first, rows)
            first, start, rows, size = first + rows, i + 1, 0, 0


def _record_batches(url: str, number: int) -> Iterator[Piece]:
    counts: list[int] = []
    with reading(url, "cannot be read as Arrow"), _raw(url) as file:
        if is_file := file.read(6) == b"ARROW1":
            file.seek(0)
            reader = pa.ipc.open_file(file)
            counts = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    if not is_file:
        yield Piece(url, number, ".arrow")
        return
    first = 0
    for i, count in enumerate(counts):
        yield Piece(url, number, ".arrow", i, i + 1, first, count)
        first += count


def _arrow(file: Any, start: int, stop: int) -> pa.Table:
    if stop == 0:
        return pa.ipc.open_stream(file).read_all()
    reader = pa.ipc.open_file(file)
    return pa.Table.from_batches([reader.get_batch(i) for i in range(start, stop)], reader.schema)


def as_sequence(source: Any) -> Sequence[str] | None:
    """Return the source as a list of paths, or None if it is not one."""
    is_list = isinstance(source, (list, tuple)) and len(source) > 0
    return [str(path) for path in source] if is_list and all(_is_path(path) for path in source) else None


def _is_path(value: Any) -> bool:
    return isinstance(value, str) or hasattr(value, "__fspath__")
