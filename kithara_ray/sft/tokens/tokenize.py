"""Convert rows of a source to a block of tokens, and report, skip or count bad rows."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.batches.blocks import TokenizedBlock, TokenizedRow
from kithara_ray.sft.rows.values import short
from kithara_ray.sft.tokens.chat import ChatTemplate, Rendered
from kithara_ray.sft.tokens.encode import chat_row, encode_all, prompt_answer_row, text_row, without_space_after_eos
from kithara_ray.sft.tokens.formats import REMEDY, PromptAnswer, Text
from kithara_ray.sft.tokens.prompts import beyond
from kithara_ray.sft.tokens.template_fit import TemplateFit
from kithara_ray.sft.tokens.tokenizer import SpecialTokens, load_tokenizer

MAX_SAMPLES = 3
ON_BAD_ROW = ("error", "skip")
# Rows that are read and encoded together.
_BATCH = 256

JOINED = (
    'prompt and answer are joined as they are, without the marks of the chat template; pass format="chat" to make each '
    'row a conversation, or format="prompt_answer" if that is meant'
)

# A row, or the error found in its place.
Row = Mapping[str, Any] | Exception


@dataclass
class RowTokenizer:
    """Convert source rows to a TokenizedBlock; picklable.

    tokenizer: a transformers tokenizer, or its handle, which each process loads once, when it first needs it.
    max_seq_len: length in tokens, including special ones, at which a row is cut.
    on_bad_row: "error" raises the DataError of the first bad row; "skip" counts bad rows and keeps the first messages.
    chat_template: Jinja that replaces the tokenizer's own template.
    vocabulary: number of tokens that the model knows; a row with other ids is bad. None checks nothing.
    """

    tokenizer: Any
    format: PromptAnswer | Text
    max_seq_len: int
    on_bad_row: str = "error"
    chat_template: str | None = None
    vocabulary: int | None = None
    _special: SpecialTokens | None = field(default=None, init=False, repr=False, compare=False)
    _fit: TemplateFit = field(default_factory=TemplateFit, init=False, repr=False, compare=False)

    def __post_init__(self):
        if not isinstance(self.tokenizer, str) and not callable(self.tokenizer):
            raise ConfigError(f"tokenizer must be a handle or a tokenizer, got {type(self.tokenizer).__name__}")
        if not isinstance(self.format, (PromptAnswer, Text)):
            raise ConfigError(f"format must be PromptAnswer or Text, got {type(self.format).__name__}")
        if isinstance(self.max_seq_len, bool) or not isinstance(self.max_seq_len, int) or self.max_seq_len < 2:
            raise ConfigError(f"max_seq_len must be an integer >= 2, got {self.max_seq_len!r}")
        if self.on_bad_row not in ON_BAD_ROW:
            raise ConfigError(f"on_bad_row must be one of {ON_BAD_ROW}, got {self.on_bad_row!r}")

    @property
    def pad_id(self) -> int:
        return self.special.pad_id

    @property
    def special(self) -> SpecialTokens:
        if self._special is None:
            self._special = SpecialTokens.of(self.loaded())
        return self._special

    def __call__(
        self, rows: Iterable[Row], first_row_index: int, place: Callable[[int], str] | None = None
    ) -> TokenizedBlock:
        """Args:
            rows: dicts of columns, and exceptions for rows that could not be read.
            first_row_index: the first row's place in the source; the rows' ids count on from it.
            place: returns the origin of the n-th of `rows`; its id by default.

        Raises DataError for a bad row under on_bad_row="error", or if there is no usable tokenizer.
        """
        return self.made(rows, first_row_index, place).block()

    def made(self, rows: Iterable[Row], first_row_index: int, place: Callable[[int], str] | None = None) -> "Made":
        """As calling the object, but rows can be read one by one."""
        made = Made(self, first_row_index, place or (lambda n: f"row {first_row_index + n}"))
        numbered = enumerate(rows)
        while batch := list(itertools.islice(numbered, _BATCH)):
            made.add(batch)
        return made

    def read(self, row: Row, where: Any) -> dict[str, Any]:
        """Read a row by its format.

        Args:
            where: the place of the row, converted to text when a message needs it.

        Raises:
            DataError: the row is bad.
        """
        if isinstance(row, Exception):
            raise DataError(f"{where}: {row}; {REMEDY}")
        try:
            return self.format.read(row, where)
        except DataError:
            raise
        except Exception as error:  # the row is data, so any error belongs to it
            raise DataError(f"{where}: cannot be read: {type(error).__name__}: {short(error)}; {REMEDY}") from error

    def tokenize(self, read: Sequence[dict[str, Any]]) -> list[TokenizedRow | DataError]:
        """Encode rows that `read` returned, all at once; a conversation that cannot be rendered becomes an error."""
        rows: dict[int, TokenizedRow | DataError] = {}
        for kind, rows_of in (("answer", self._pairs), ("text", self._texts), ("messages", self._chats)):
            places = [place for place, row in enumerate(read) if kind in row]
            made = rows_of([read[place] for place in places]) if places else []
            rows.update(zip(places, made, strict=True))
        return [rows[place] for place in range(len(read))]

    def _pairs(self, read: Sequence[dict[str, Any]]) -> list[TokenizedRow]:
        tokenizer, special = self.loaded(), self.special
        prompts = [row["prompt"] for row in read]
        answers = [without_space_after_eos(row["answer"], tokenizer, special) for row in read]
        ids = encode_all(prompts + [p + a for p, a in zip(prompts, answers, strict=True)], tokenizer)
        both = zip(prompts, answers, ids[: len(read)], ids[len(read) :], strict=True)
        made = [prompt_answer_row(*row, tokenizer, special, self.max_seq_len) for row in both]
        if not self._has_unused_template():
            return made
        return [
            row if any(mark in prompt for mark in special.marks) else dataclasses.replace(row, notes=(JOINED,))
            for prompt, row in zip(prompts, made, strict=True)
        ]

    def _has_unused_template(self) -> bool:
        """Return True if rows of prompt and answer may bypass a chat template by mistake."""
        if self.chat_template is not None:
            return True
        return self.format.format == "auto" and bool(getattr(self.loaded(), "chat_template", None))

    def _texts(self, read: Sequence[dict[str, Any]]) -> list[TokenizedRow]:
        tokenizer, special = self.loaded(), self.special
        ids = encode_all([without_space_after_eos(row["text"], tokenizer, special) for row in read], tokenizer)
        return [text_row(row, special, self.max_seq_len) for row in ids]

    def _chats(self, read: Sequence[dict[str, Any]]) -> list[TokenizedRow | DataError]:
        tokenizer = self.loaded()
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"conversations need a fast tokenizer, with tokenizer.json; got {type(tokenizer).__name__}")
        template = ChatTemplate(tokenizer, self.chat_template, self._fit)
        rendered = []
        for row in read:
            try:
                rendered.append(template(row["messages"], row["tools"], row["options"]))
            except DataError as error:
                rendered.append(error)
        texts = [each.text for each in rendered if isinstance(each, Rendered)]
        encodings = iter(tokenizer(texts, add_special_tokens=False, verbose=False).encodings if texts else ())
        return [
            chat_row(each, next(encodings), self.special, self.max_seq_len) if isinstance(each, Rendered) else each
            for each in rendered
        ]

    def beyond_vocabulary(self, row: TokenizedRow) -> str | None:
        """Describe the fault of a row with a token that the model does not know; None if there is none."""
        return beyond(row.token_ids, self.vocabulary, self.loaded()) if self.vocabulary is not None else None

    def loaded(self) -> Any:
        """The tokenizer itself."""
        return load_tokenizer(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer


class _Where:
    """The place of a row, found only when it is written, because in a file this may require counting lines."""

    def __init__(self, place: Callable[[int], str], number: int):
        self.place, self.number = place, number

    def __str__(self) -> str:
        return self.place(self.number)


class Made:
    """A block under construction: the rows kept, and counts of the others."""

    def __init__(self, tokenizer: RowTokenizer, first_row_index: int, place: Callable[[int], str]):
        self.tokenizer, self.first, self.place = tokenizer, first_row_index, place
        self.row_ids: list[int] = []
        self.kept: list[TokenizedRow] = []
        self.messages: list[str] = []
        self.formats: collections.Counter[str] = collections.Counter()
        self.notes: collections.Counter[str] = collections.Counter()
        self.dropped_untrained = self.skipped_bad = 0
        self.columns: tuple[tuple[str, bool], ...] = ()  # see TokenizedBlock

    def add(self, batch: list[tuple[int, Row]]) -> None:
        read = []
        for number, row in batch:
            try:
                read.append((number, self.tokenizer.read(row, _Where(self.place, number))))
            except DataError as error:
                self._bad(error)
        for (number, source), row in zip(read, self._tokenized([row for _, row in read]), strict=True):
            if isinstance(row, DataError):
                self._bad(DataError(f"{self.place(number)}: {row}"))
            elif wrong := self.tokenizer.beyond_vocabulary(row):
                self._bad(DataError(f"{self.place(number)}: {wrong}"))
            elif row.is_trained:
                self.row_ids.append(self.first + number)
                self.kept.append(row)
                self.formats[_format_of(source)] += 1
                self.notes.update(source.get("notes", ()) + row.notes)
            else:
                self.dropped_untrained += 1
                self._note(partial(self._untrained, number))

    def _tokenized(self, read: list[dict[str, Any]]) -> list[TokenizedRow | DataError]:
        try:
            return self.tokenizer.tokenize(read)
        except DataError:
            raise
        except Exception as error:  # of one row, which fails its whole batch
            if len(read) == 1:
                return [DataError(f"{type(error).__name__}: {short(error)}; {REMEDY}")]
            return [row for each in read for row in self._tokenized([each])]

    def rows(self) -> Iterator[TokenizedRow]:
        """Yield the rows kept, each with its place."""
        for row_id, row in zip(self.row_ids, self.kept, strict=True):
            yield dataclasses.replace(row, place=self.place(row_id - self.first))

    def _untrained(self, number: int) -> str:
        return (
            f"{self.place(number)}: nothing to train on within max_seq_len {self.tokenizer.max_seq_len}, because the "
            "prompt fills it; raise max_seq_len or shorten the prompt"
        )

    def _bad(self, error: DataError) -> None:
        if self.tokenizer.on_bad_row == "error":
            raise error
        self.skipped_bad += 1
        self._note(lambda: str(error))

    def _note(self, message: Callable[[], str]) -> None:
        if len(self.messages) < MAX_SAMPLES:
            self.messages.append(message())

    def block(self) -> TokenizedBlock:
        kept = self.kept
        return TokenizedBlock(
            row_ids=np.asarray(self.row_ids, np.int64),
            lengths=np.asarray([len(row.token_ids) for row in kept], np.int32),
            token_ids=np.concatenate([np.empty(0, np.int32), *(row.token_ids for row in kept)]),
            loss_mask=np.concatenate([np.empty(0, np.uint8), *(row.loss_mask for row in kept)]),
            dropped_untrained=self.dropped_untrained,
            skipped_bad=self.skipped_bad,
            truncated=sum(row.truncated for row in kept),
            unlearned_messages=sum(row.unlearned for row in kept),
            samples=tuple(self.messages),
            columns=self.columns,
            formats=dict(self.formats),
            notes=dict(self.notes),
        )


def _format_of(read: Mapping[str, Any]) -> str:
    """The name of the format in which a row was read."""
    plain = "prompt_answer" if "answer" in read else "text" if "text" in read else "messages"
    return read.get("format", plain)
