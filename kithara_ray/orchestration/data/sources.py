"""Cut the rows of any source into work for tokenising tasks, in the data's own order.

`sft.rows.files` cuts and reads files. The driver sends in-memory rows a slice at a time. A Ray Dataset is streamed
block by block. Every kind of source goes through the same normalisation, `sft.rows.values`.
"""

import dataclasses
import itertools
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from kithara_ray.errors import DataError
from kithara_ray.orchestration.cluster import ray_compat
from kithara_ray.sft.batches.blocks import TokenizedBlock, TokenizedRow
from kithara_ray.sft.rows import files, values
from kithara_ray.sft.rows.columns import Columns
from kithara_ray.sft.rows.files import Piece
from kithara_ray.sft.rows.listing import Choice, chosen
from kithara_ray.sft.tokens.tokenize import Made, RowTokenizer

# Maximum rows and bytes of one task, taken from rows in the driver or from a block of Ray Data.
_SLICE_ROWS = 2048
_SLICE_BYTES = 2 * files.PIECE_BYTES
# Up to so many rows, or bytes of files, are tokenised in the driver: a second or less, which a task needs to start.
FEW_ROWS = 512
FEW_BYTES = 2**18
COUNTS = {
    "dropped_untrained": "were dropped because truncation left nothing to train",
    "skipped_bad": "were skipped as bad",
    "truncated": "were truncated",
    "unlearned_messages": "assistant messages were not trained on, because the chat template later shows them in "
    "another form",
}


# Formats of a Hugging Face dataset that only change the container of a value; other formats change the rows.
_CONTAINERS = (None, "python", "numpy", "torch", "tensorflow", "jax", "pandas", "arrow", "polars")


@dataclass(frozen=True)
class Work:
    """Rows for one task.

    Attributes:
        name: name of the source, for messages; empty for the only source.
        piece: part of a file; None for rows in memory.
        payload: the piece's content, if the driver has loaded it; else rows as a list, or an Arrow table.
        first_row: number of the first row in the source, or of the piece's first line in its file.
        keep_nulls, shapes: for rows that are a list, see `sft.rows.values.plain`.
        kept: range of the piece's rows that belong to the source; None keeps all.
    """

    name: str
    piece: Piece | None
    payload: Any
    first_row: int
    keep_nulls: bool = True
    shapes: Mapping[str, Any] | None = None
    kept: tuple[int, int] | None = None

    def tokenize(self, tokenize: RowTokenizer, block: Any = None, start: int = 0, stop: int = 0) -> TokenizedBlock:
        """Tokenise the rows. `block`, `start` and `stop` give rows of a Ray Data block, if the payload has none."""
        return self._made(tokenize, block, start, stop).block()

    def tokenized_rows(
        self, tokenize: RowTokenizer, block: Any = None, start: int = 0, stop: int = 0
    ) -> tuple[TokenizedBlock, Iterator[TokenizedRow]]:
        """Tokenise the rows; return the block, and its rows with their positions in the source."""
        made = self._made(tokenize, block, start, stop)
        return made.block(), made.rows()

    def count(self) -> int:
        """Count the piece's rows, by reading them unless the file's header tells. Raises DataError."""
        piece = self.piece
        assert piece is not None
        if piece.num_rows:
            return piece.num_rows
        return sum(1 for _ in piece.rows(self.payload if self.payload is not None else piece.load()))

    def rows(self, block: Any = None, start: int = 0, stop: int = 0) -> list[Any]:
        """Return the normalised rows in memory; an exception stands in for each row that cannot be read.

        Raises:
            DataError: two columns have the same name.
        """
        if block is not None:
            return _rows_of_block(block, start, stop)
        if isinstance(self.payload, pa.Table):
            return values.rows_of(self.payload)
        return [values.plain_row(row, self.keep_nulls, self.shapes) for row in self.payload]

    def share_of_few(self, part: tuple) -> float:
        """Return the share of `FEW_ROWS` that this is, or of `FEW_BYTES` for text; infinite if it is not known.

        Args:
            part: the Ray Data block and row range, if the rows are there.
        """
        if part:
            return (part[2] - part[1]) / FEW_ROWS
        if self.payload is None:
            return math.inf
        return len(self.payload) / (FEW_BYTES if isinstance(self.payload, bytes) else FEW_ROWS)

    def _made(self, tokenize: RowTokenizer, block: Any, start: int, stop: int) -> Made:
        columns = Columns()
        if self.piece is not None:
            rows, first, where = self._of_piece(self.piece, tokenize)
        else:
            rows, first, where = self.rows(block, start, stop), self.first_row, self._where
        made = tokenize.made(map(columns.watched, rows), first, where)
        # A formatting function receives all columns, and may read any.
        made.columns = columns.found() if tokenize.format.custom_formatting_fn is None else ()
        return made

    def _where(self, number: int) -> str:
        return f"row {self.first_row + number}{f' of {self.name}' if self.name else ''}"

    def _of_piece(self, piece: Piece, tokenize: RowTokenizer) -> tuple[Iterable[Any], int, Callable[[int], str]]:
        begin, end = self.kept or (0, None)
        places: list[str] = []

        def rows() -> Iterator[Any]:
            try:
                loaded = self.payload if self.payload is not None else piece.load()
            except DataError as error:
                if tokenize.on_bad_row == "error" or not piece.num_rows:
                    raise
                unread = range(piece.num_rows)[begin:end]
                places.extend(f"row {piece.first_row + n}" for n in unread)
                yield from [error] * len(unread)
                return
            for place, row in itertools.islice(piece.rows(loaded), begin, end):
                places.append(place)
                yield row

        def where(number: int) -> str:
            kind, count = places[number].split()
            if piece.kind in files.LINES:
                before = self.first_row if self.payload is not None else piece.lines_before()
                return f"{kind} {int(count) + before} of {piece.url}"
            return f"{kind} {count} of {piece.url}"

        return rows(), piece.first_id + begin, where


def work(source: Any, name: str = "", choice: Choice | None = None) -> Iterator[tuple[Work, tuple]]:
    """Yield the source's rows as work for one task each, with the Ray Data block and row range that hold the rows.

    Args:
        choice: the split and subset to take, for files.

    Raises:
        DataError: the source is not something to read rows from.
    """
    if isinstance(source, (str, Path)) or files.as_sequence(source):
        if choice is not None and choice.rows is not None:
            yield from _sliced(source, name, choice)
        else:
            yield from _of_files(source, name, choice)
    elif is_ray_dataset(source):
        yield from _of_ray(source, name)
    elif isinstance(source, (list, tuple)):
        if not source:
            raise DataError("the dataset is empty: the list of rows has no element")
        yield from _slices(len(source), lambda start, stop: list(source[start:stop]), name)
    elif isinstance(source, pa.Table):
        values.check_names(source.column_names)
        yield from _slices(len(source), lambda start, stop: source.slice(start, stop - start), name)
    elif hasattr(source, "with_format") and hasattr(source, "features") and hasattr(source, "__len__"):
        yield from _of_hugging_face(source, name)
    elif hasattr(source, "to_dict") and hasattr(source, "iloc"):
        values.check_names(source.columns)
        cut = lambda start, stop: source.iloc[start:stop].to_dict(orient="records")  # noqa: E731
        yield from _slices(len(source), cut, name, keep_nulls=False)
    elif is_splits(source):
        chosen(source, None, f"the {type(source).__name__}")
    else:
        kind = type(source)
        named = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise DataError(
            f"a dataset cannot be made of {named}; give a path, URL or list of these, a list of dicts, a Ray Dataset, "
            "a Hugging Face dataset, a pandas DataFrame or an Arrow table"
        )


def few(works: Iterator[tuple[Work, tuple]]) -> tuple[list[tuple[Work, tuple]], Iterator[tuple[Work, tuple]] | None]:
    """Return (all of the work, None) if it is only a few rows; else (the beginning, all of the work)."""
    taken: list[tuple[Work, tuple]] = []
    while sum(work.share_of_few(part) for work, part in taken) <= 1:
        try:
            taken.append(next(works))
        except StopIteration:
            return taken, None
    return taken, itertools.chain(taken, works)


def stream(source: Any, rows: int) -> Iterator[Work]:
    """Yield one pass over a stream, `rows` rows at a time.

    Raises:
        DataError: the stream fails.
    """
    features = getattr(source, "features", None)
    shapes = _shapes(features) if features else None
    found, first = _stream_rows(source), 0
    while taken := list(itertools.islice(found, rows)):
        yield Work("the stream", None, taken, first, keep_nulls=False, shapes=shapes)
        first += len(taken)


def _stream_rows(source: Any) -> Iterator[Any]:
    rows, number = iter(source), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:  # raised by the user's stream; nothing follows it
            raise DataError(
                f"row {number} of the stream: cannot be read: {type(error).__name__}: {values.short(error)}; correct "
                "the source, or leave the row out there"
            ) from error
        number += 1
        if isinstance(row, pa.Table):  # a stream with a format yields tables and frames of one row each
            yield from values.rows_of(row)
        elif hasattr(row, "to_dict") and hasattr(row, "iloc"):
            yield from row.to_dict(orient="records")
        else:
            yield row


def is_splits(source: Any) -> bool:
    """True for a DatasetDict, or a dict like one."""
    return isinstance(source, dict) and bool(source) and all(hasattr(part, "features") for part in source.values())


def part_of(source: Any, choice: Choice) -> Any:
    """Return the source itself, or the chosen one of its splits. For files, the listing applies the choice.

    Raises:
        DataError: there is no such split.
    """
    if isinstance(source, (str, Path)) or files.as_sequence(source):
        return source
    if choice.subset is not None:
        raise DataError(f"subset={choice.subset!r} is for a directory or hf://datasets/...; leave it out")
    if is_splits(source):
        several = choice.name is None and len(source) > 1
        if several and choice.rows is None:
            return source
        return _rows_of(source[chosen(source, choice.name, f"the {type(source).__name__}")], choice)
    own = getattr(source, "split", None)
    if choice.rows is not None and hasattr(source, "select") and choice.name in (None, str(own)):
        return _rows_of(source, choice)
    if choice.split is not None and choice.split != str(own):
        raise DataError(
            f"split={choice.split!r} is for a directory, files or a DatasetDict; a {type(source).__name__} has no "
            "splits: leave it out"
        )
    return source


def _rows_of(dataset: Any, choice: Choice) -> Any:
    """Return the chosen rows of a Hugging Face dataset. Raises DataError if it streams, or no row is chosen."""
    if choice.rows is None:
        return dataset
    if not hasattr(dataset, "__len__"):
        raise DataError(f"split={choice.split!r}: a stream has no slices; use its take() and skip()")
    if not (rows := choice.rows.of(len(dataset))):
        raise DataError(f"split={choice.split!r}: the slice is empty; the split has {len(dataset)} rows")
    return dataset.select(rows)


def is_ray_dataset(source: Any) -> bool:
    """True for a Ray Dataset. Does not import ray.data, which takes a second: whoever holds a dataset has loaded it."""
    loaded = sys.modules.get("ray.data")
    return loaded is not None and isinstance(source, loaded.Dataset)


def _of_files(source: Any, name: str, choice: Choice | None) -> Iterator[tuple[Work, tuple]]:
    lines = {}
    for piece in files.pieces(files.as_sequence(source) or source, choice=choice):
        if not files.is_local(piece.url):
            yield Work(name, piece, None, 0), ()
            continue
        # Only this node is certain to have the file. The driver reads all of it, so it also knows the line numbers.
        try:
            payload = piece.load()
        except DataError:
            payload = None  # the task meets the same error, and handles it
        before = lines.get(piece.url, 0)
        if piece.kind in files.LINES and payload is not None:
            lines[piece.url] = before + payload.count(b"\n")
        yield Work(name, piece, payload, before), ()


def _sliced(source: Any, name: str, choice: Choice) -> Iterator[tuple[Work, tuple]]:
    """Yield the works of a slice of the rows. All files are read once more, to count their rows."""
    counts = [piece.count() for piece, _ in _of_files(source, name, choice)]
    assert choice.rows is not None
    wanted, before = choice.rows.of(sum(counts)), 0
    if not wanted:
        raise DataError(f"split={choice.split!r}: the slice is empty; the split has {sum(counts)} rows")
    for count, (piece, part) in zip(counts, _of_files(source, name, choice), strict=True):
        begin, end = max(wanted.start - before, 0), min(wanted.stop - before, count)
        if begin < end:
            yield dataclasses.replace(piece, kept=(begin, end)), part
        before += count


def _slices(count: int, cut: Callable, name: str, **how: Any) -> Iterator[tuple[Work, tuple]]:
    for start in range(0, count, _SLICE_ROWS):
        yield Work(name, None, cut(start, min(start + _SLICE_ROWS, count)), start, **how), ()


def _of_hugging_face(source: Any, name: str) -> Iterator[tuple[Work, tuple]]:
    """Yield the rows that the dataset shows: with its transform applied, and only the columns that its format keeps."""
    shown = source.format
    if shown["type"] in _CONTAINERS:
        columns = None if shown["output_all_columns"] else shown["columns"]
        table, features = source.with_format("arrow", columns=columns), source.features.to_dict()
        yield from _slices(len(source), lambda a, b: values.with_features(table[a:b], features), name)
        return

    def row(number: int) -> Any:
        try:
            return source[number]
        except Exception as error:  # from the user's code: any error belongs to this row
            return ValueError(f"the dataset's transform failed: {type(error).__name__}: {values.short(error)}")

    cut = lambda start, stop: [row(number) for number in range(start, stop)]  # noqa: E731
    yield from _slices(len(source), cut, name, keep_nulls=False, shapes=_shapes(source.features))


def _shapes(features: Any) -> dict[str, Any]:
    """Return the shapes of columns, from the features of a Hugging Face dataset."""
    return {name: values.shape_of_feature(feature) for name, feature in features.to_dict().items()}


def _of_ray(dataset: Any, name: str) -> Iterator[tuple[Work, tuple]]:
    """Yield blocks as Ray Data makes them, in order, each in parts."""
    # By default Ray Data yields blocks as they become ready, so the same data would have a different order each time.
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    # Ray Data logs its progress bars and each execution; the run's own progress shows all that a user needs.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    first = 0
    for block, count, nbytes in ray_compat.block_refs(dataset):
        parts = max(1, -(-nbytes // _SLICE_BYTES))
        rows = max(1, -(-count // parts))
        for start in range(0, count, rows):
            yield Work(name, None, None, first + start), (block, start, min(start + rows, count))
        first += count


def _rows_of_block(block: Any, start: int, stop: int) -> list[Any]:
    """Return the rows of a block exactly as Ray Data gives them."""
    if isinstance(block, list):
        return [values.plain_row(row) for row in block[start:stop]]
    # Imported here because it takes a second, and only a Ray Dataset has blocks.
    from ray.data.block import BlockAccessor

    is_arrow = isinstance(block, pa.Table)
    values.check_names(block.column_names if is_arrow else block.columns)
    shapes = values.shapes_of(block.schema) if is_arrow else None
    rows = _readable(BlockAccessor.for_block(block), start, stop)
    return [values.plain_row(row, False, shapes, decode=True) for row in rows]


def _readable(accessor: Any, start: int, stop: int) -> list[Any]:
    """Return rows of a block. If they cannot be read together, a ValueError stands in for each unreadable row."""
    from ray.data.block import BlockAccessor  # as above

    try:
        return list(BlockAccessor.for_block(accessor.slice(start, stop)).iter_rows(public_row_format=True))
    except Exception as error:  # a value that Python cannot represent
        if stop - start == 1:
            return [ValueError(f"cannot be read: {type(error).__name__}: {values.short(error)}")]
        return [row for number in range(start, stop) for row in _readable(accessor, number, number + 1)]
