"""Preview a dataset as the model sees it: rows with their trained tokens marked, lengths, and packing efficiency."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kithara_ray.sft.batches.blocks import TokenizedRow
from kithara_ray.sft.batches.packing import best_fit
from kithara_ray.sft.batches.told import NOTHING, Told

_LEARNED = "bold green"
_BAR_WIDTH = 30


@dataclass(frozen=True)
class Preview:
    """Attributes:
    rows: pieces of each row shown, (text, True if it is trained).
    lengths, trained: tokens and trained tokens of every row of the dataset.
    max_seq_len: length at which rows are cut.
    counts: numbers of rows dropped, skipped and truncated.
    packing_efficiency: share of a packed sequence that is not padding.
    unread: columns of the source that nothing reads.
    told: formats of the rows, and fields without effect.
    """

    rows: tuple[tuple[tuple[str, bool], ...], ...]
    lengths: np.ndarray
    trained: np.ndarray
    max_seq_len: int
    counts: dict[str, int]
    packing_efficiency: float
    unread: tuple[str, ...] = ()
    told: Told = NOTHING

    @property
    def tokens_per_epoch(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def trained_per_epoch(self) -> int:
        return int(self.trained.sum(dtype=np.int64))

    @property
    def truncated_share(self) -> float:
        return self.counts["truncated"] / len(self.lengths)

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return (from, to, rows) for tenths of the longest row; the last tenth includes it."""
        edges = np.unique(np.linspace(0, int(self.lengths.max()), 11).astype(int))
        counts, _ = np.histogram(self.lengths, edges)
        return [(int(a), int(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]

    def render(self) -> RenderableType:
        """Render for a terminal: `rich.print(preview.render())`."""
        shown = [Panel(_marked(row), title=f"row {number}", title_align="left") for number, row in enumerate(self.rows)]
        legend = Text.assemble("learned tokens are ", ("marked", _LEARNED))
        return Group(*shown, legend, self._figures(), self._bars())

    def __str__(self) -> str:
        """As `render`, without colours; trained text is in «»."""
        from rich.console import Console

        lines = []
        for number, row in enumerate(self.rows):
            lines += [f"row {number}: " + "".join(f"«{text}»" if learned else text for text, learned in row), ""]
        console = Console(width=100, no_color=True)
        with console.capture() as captured:
            console.print(self._figures(), self._bars())
        return "\n".join(lines) + captured.get()

    def _figures(self) -> Table:
        lengths = self.lengths
        table = Table.grid(padding=(0, 2))
        figures = {
            "rows": f"{len(lengths):,}",
            "tokens an epoch": f"{self.tokens_per_epoch:,}, of which {self.trained_per_epoch:,} are learned "
            f"({self.trained_per_epoch / self.tokens_per_epoch:.0%})",
            "tokens a row": f"median {np.median(lengths):.0f}, 95 % within {np.quantile(lengths, 0.95):.0f}, "
            f"longest {lengths.max()}",
            "truncated": f"{self.counts['truncated']:,} ({self.truncated_share:.1%}) at max_seq_len {self.max_seq_len}",
            "dropped": f"{self.counts['dropped_untrained']:,} with nothing to train on after truncation",
            "skipped": f"{self.counts['skipped_bad']:,} bad rows",
            "packed": f"{self.packing_efficiency:.1%} of each sequence of {self.max_seq_len} tokens is filled; "
            f"one row per sequence would fill {lengths.mean() / self.max_seq_len:.1%}",
        }
        if self.counts.get("unlearned_messages"):
            count = self.counts["unlearned_messages"]
            figures["not learned"] = f"{count:,} messages that the chat template later shows in another form"
        if self.told.formats:
            figures["format"] = self.told.format_line()
        if self.told.notes:
            figures["note"] = "\n".join(f"{note} ({rows:,} rows)" for note, rows in self.told.notes.items())
        if self.unread:
            figures["columns"] = f"nothing reads {', '.join(map(repr, self.unread))}"
        for name, value in figures.items():
            table.add_row(name, value)
        return table

    def _bars(self) -> Table:
        table = Table.grid(padding=(0, 2))
        rows = self.histogram()
        most = max(count for *_, count in rows)
        for start, stop, count in rows:
            table.add_row(f"{start}-{stop}", "█" * round(_BAR_WIDTH * count / most), f"{count:,}")
        return table


def preview(
    rows: Sequence[TokenizedRow],
    tokenizer: Any,
    lengths: np.ndarray,
    trained: np.ndarray,
    max_seq_len: int,
    counts: dict[str, int],
    unread: Sequence[str] = (),
    told: Told = NOTHING,
) -> Preview:
    """Args:
    rows: rows to show.
    lengths, trained: tokens and trained tokens of all rows.
    unread: columns that nothing reads.
    told: further facts about the rows.
    """
    shown = tuple(tuple(_pieces(row, tokenizer)) for row in rows)
    order = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(lengths))
    _, starts = best_fit(order, lengths, trained, max_seq_len, max_seq_len)
    filled = float(lengths.sum(dtype=np.int64) / (max_seq_len * (len(starts) - 1)))
    return Preview(shown, lengths, trained, max_seq_len, dict(counts), filled, tuple(unread), told)


def _pieces(row: TokenizedRow, tokenizer: Any):
    """Yield the text that each stretch of trained or untrained tokens adds to the text before it."""
    edges = [0, *(np.flatnonzero(np.diff(row.loss_mask)) + 1).tolist(), len(row.token_ids)]
    before = ""
    for start, stop in itertools.pairwise(edges):
        text = tokenizer.decode(
            row.token_ids[:stop].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        # A character may be split at the border; then the text before it changes.
        yield text[_shared(before, text) :], bool(row.loss_mask[start])
        before = text


def _shared(before: str, text: str) -> int:
    if text.startswith(before):
        return len(before)
    return next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(text))


def _marked(row: Sequence[tuple[str, bool]]) -> Text:
    text = Text()
    for piece, learned in row:
        text.append(piece, style=_LEARNED if learned else "")
    return text
