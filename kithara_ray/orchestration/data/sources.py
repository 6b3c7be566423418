"""Whatever rows come from, cut into work for tokenising tasks, in an order that is the data's own.

Files are cut and read by `sft.files`; what the driver holds is handed over a slice at a time; a Ray Dataset is streamed
block by block.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from kithara_ray.errors import DataError
from kithara_ray.orchestration.cluster import ray_compat
from kithara_ray.sft.batches.blocks import TokenizedBlock
from kithara_ray.sft.rows import files
from kithara_ray.sft.rows.files import Piece
from kithara_ray.sft.tokens.tokenize import RowTokenizer

# Of what the driver holds, or of a block of Ray Data, in one task.
_SLICE_ROWS = 2048
_SLICE_BYTES = 2 * files.PIECE_BYTES
COUNTS = {
    "dropped_untrained": "were dropped because truncation left nothing to train",
    "skipped_bad": "were skipped as bad",
    "truncated": "were truncated",
    "unlearned_messages": "messages of the assistant were not learned, as the chat template shows them otherwise later",
}


@dataclass(frozen=True)
class Work:
    """Rows for one task.

    Attributes:
        name: of the source, for messages; empty for the only one.
        piece: of a file; None for rows in memory.
        payload: what the piece loads, if the driver has loaded it; else rows as a list of dicts or an Arrow table.
        first_row: the number of the first row in the source, or of the first line of the piece in its file.
    """

    name: str
    piece: Piece | None
    payload: Any
    first_row: int

    def tokenize(self, tokenize: RowTokenizer, block: Any = None, start: int = 0, stop: int = 0) -> TokenizedBlock:
        """`block`, `start` and `stop`: rows of a block of Ray Data, where they are not in the payload."""
        if self.piece is None:
            rows = rows_of(block, start, stop) if block is not None else rows_of(self.payload)
            return tokenize(rows, self.first_row, lambda n: f"row {self.first_row + n}{self._of()}")
        return self._tokenize_piece(tokenize)

    def _of(self) -> str:
        return f" of {self.name}" if self.name else ""

    def _tokenize_piece(self, tokenize: RowTokenizer) -> TokenizedBlock:
        piece = self.piece
        try:
            loaded = self.payload if self.payload is not None else piece.load()
        except DataError as error:
            if tokenize.on_bad_row == "error" or not piece.num_rows:
                raise
            loaded = error
        places: list[str] = []

        def rows():
            if isinstance(loaded, DataError):
                places.extend(f"row {piece.first_row + n}" for n in range(piece.num_rows))
                yield from [loaded] * piece.num_rows
                return
            for place, row in piece.rows(loaded):
                places.append(place)
                yield row

        def where(number: int) -> str:
            kind, count = places[number].split()
            if piece.kind in files.LINES:
                before = self.first_row if self.payload is not None else piece.lines_before()
                return f"{kind} {int(count) + before} of {piece.url}"
            return f"{kind} {count} of {piece.url}"

        return tokenize(rows(), piece.first_id, where)


@ray.remote(num_returns=2, num_cpus=1)
def tokenize_rows(tokenize: RowTokenizer, work: Work, block=None, start: int = 0, stop: int = 0):
    """Some rows of the source, tokenised; and what the driver must know of them."""
    tokenized = work.tokenize(tokenize, block, start, stop)
    counts = {name: getattr(tokenized, name) for name in COUNTS}
    summary = tokenized.lengths, tokenized.trained(), counts, list(tokenized.samples), tokenized.content()
    return tokenized, summary


def work(source: Any, name: str = "") -> Iterator[tuple[Work, tuple]]:
    """The source's rows, a task's at a time: the work, and the block and rows of it where Ray Data holds them.

    Raises:
        DataError: nothing rows can be read from.
    """
    if isinstance(source, (str, Path)) or files.as_sequence(source):
        yield from _of_files(source, name)
    elif is_ray_dataset(source):
        yield from _of_ray(source, name)
    elif isinstance(source, list):
        if not source:
            raise DataError("the dataset is empty: the list of rows has no element")
        yield from _slices(len(source), lambda start, stop: source[start:stop], name)
    elif isinstance(source, pa.Table):
        yield from _slices(len(source), lambda start, stop: source.slice(start, stop - start), name)
    elif hasattr(source, "with_format") and hasattr(source, "features") and hasattr(source, "__len__"):
        table = source.with_format("arrow")
        yield from _slices(len(source), lambda start, stop: table[start:stop], name)
    elif hasattr(source, "to_dict") and hasattr(source, "iloc"):
        yield from _slices(len(source), lambda a, b: source.iloc[a:b].to_dict(orient="records"), name)
    elif isinstance(source, dict) and source and all(hasattr(part, "features") for part in source.values()):
        raise DataError(f"a dataset of several splits, {', '.join(map(repr, source))}; choose one: dataset['train']")
    else:
        raise DataError(
            f"a dataset cannot be made of {type(source).__name__}; give a path, URL or list of these, a list of dicts, "
            "a Ray Dataset, a Hugging Face dataset, a pandas DataFrame or an Arrow table"
        )


def is_ray_dataset(source: Any) -> bool:
    """Whoever holds one has loaded ray.data, which takes a second and is not for each process of a run."""
    loaded = sys.modules.get("ray.data")
    return loaded is not None and isinstance(source, loaded.Dataset)


def _of_files(source: Any, name: str) -> Iterator[tuple[Work, tuple]]:
    lines = {}
    for piece in files.pieces(files.as_sequence(source) or source):
        if not files.is_local(piece.url):
            yield Work(name, piece, None, 0), ()
            continue
        # Only this node surely has the file. As the driver reads all of it, it knows the lines as well.
        try:
            payload = piece.load()
        except DataError:
            payload = None  # the task finds the same, and knows what to do about it
        before = lines.get(piece.url, 0)
        if piece.kind in files.LINES and payload is not None:
            lines[piece.url] = before + payload.count(b"\n")
        yield Work(name, piece, payload, before), ()


def _slices(count: int, cut, name: str) -> Iterator[tuple[Work, tuple]]:
    for start in range(0, count, _SLICE_ROWS):
        yield Work(name, None, cut(start, min(start + _SLICE_ROWS, count)), start), ()


def _of_ray(dataset: Any, name: str) -> Iterator[tuple[Work, tuple]]:
    """Blocks as Ray Data makes them, in order, each in parts."""
    # The default lets blocks come as they are ready; then the same data has another order every time.
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    # Ray Data tells of its progress bars and of each execution; what a user must know is in the run's own progress.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    first = 0
    for block, count, nbytes in ray_compat.block_refs(dataset):
        parts = max(1, -(-nbytes // _SLICE_BYTES))
        rows = max(1, -(-count // parts))
        for start in range(0, count, rows):
            yield Work(name, None, None, first + start), (block, start, min(start + rows, count))
        first += count


def rows_of(block: Any, start: int = 0, stop: int | None = None) -> list[Any]:
    if isinstance(block, pa.Table):
        return files.rows_of(block.slice(start, None if stop is None else stop - start))
    return block[start:stop] if isinstance(block, list) else block.iloc[start:stop].to_dict(orient="records")
