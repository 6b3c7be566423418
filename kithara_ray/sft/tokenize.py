"""Text to token ids and the mask of what is learned. No padding, no shifting, no batching.

T is a row's length in tokens, N the number of rows of a block. `loss_mask[t] == 1` if and only if token t is to be
predicted, which is done from position t-1; so `loss_mask[0]` is always 0.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.chat import ChatTemplate, Rendered
from kithara_ray.sft.formats import REMEDY, PromptAnswer, Text
from kithara_ray.sft.tokenizer import SpecialTokens, load_tokenizer

MAX_SAMPLES = 3
ON_BAD_ROW = ("error", "skip")


@dataclass(frozen=True, eq=False)
class TokenizedRow:
    token_ids: np.ndarray  # int32 (T,)
    loss_mask: np.ndarray  # uint8 (T,)
    truncated: bool = False  # tokens beyond max_seq_len, up to the last to be learned, were cut off
    unlearned: int = 0  # messages of the assistant that the chat template shows otherwise than it asks for them

    @property
    def is_trained(self) -> bool:
        return bool(self.loss_mask.any())


@dataclass(frozen=True, eq=False)
class TokenizedBlock:
    """N rows laid end to end, in source order, and what became of the others."""

    row_ids: np.ndarray  # int64 (N,), the row's place in the source
    lengths: np.ndarray  # int32 (N,)
    token_ids: np.ndarray  # int32 (sum of lengths,)
    loss_mask: np.ndarray  # uint8 (sum of lengths,)
    dropped_untrained: int = 0  # rows of which truncation left no trained token
    skipped_bad: int = 0  # bad rows, under on_bad_row="skip"
    truncated: int = 0  # rows kept, but cut at max_seq_len
    unlearned_messages: int = 0  # in rows kept
    samples: tuple[str, ...] = ()  # messages about the first of the rows dropped or skipped

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.row_ids, self.lengths, self.token_ids, self.loss_mask))

    def trained(self) -> np.ndarray:
        """Tokens to be learned of each row, int32 (N,)."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])
        return (before[ends] - before[ends - self.lengths]).astype(np.int32)

    def content(self) -> int:
        """128 bits of the rows' tokens, masks and places in the source; of several blocks, the sum modulo 2**128.

        So it is the same however the source is cut into blocks.
        """
        total = 0
        for row_id, row in zip(self.row_ids.tolist(), self.rows(), strict=True):
            digest = hashlib.sha256(row_id.to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(row.token_ids))
            digest.update(np.ascontiguousarray(row.loss_mask))
            total += int.from_bytes(digest.digest()[:16], "little")
        return total % (1 << 128)

    def rows(self) -> Iterator[TokenizedRow]:
        ends = np.cumsum(self.lengths, dtype=np.int64)
        for start, end in zip(ends - self.lengths, ends, strict=True):
            yield TokenizedRow(self.token_ids[start:end], self.loss_mask[start:end])


def encode(text: str, tokenizer: Any) -> list[int]:
    """The ids of exactly this text. Special tokens written in it (chat markers) become special tokens."""
    # verbose=False: rows longer than the tokenizer's model_max_length are cut here, not by the model.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_all(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """`encode` of each, at once: a fast tokenizer then takes a fraction of the time."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def encode_prompt(prompt: str, tokenizer: Any, special: SpecialTokens) -> list[int]:
    """The ids a prompt is trained with, and so has to be given at inference: BOS once, if this tokenizer puts one."""
    return _with_bos(encode(prompt, tokenizer), special)


def tokenize_prompt_answer(
    prompt: str, answer: str, tokenizer: Any, special: SpecialTokens, max_seq_len: int
) -> TokenizedRow:
    """BOS, prompt, answer, EOS; the answer and EOS are learned.

    - The row begins with the prompt's own ids, as inference sees them, even where prompt + answer would merge across
      the boundary.
    - BOS stands first exactly once if the tokenizer puts one, whether or not the text begins with it (rendered chat
      templates do). EOS stands last exactly once, whether or not the answer ends with it (and with the white space that
      chat templates put behind it).
    - Cut at `max_seq_len` from the right. If nothing of the answer is left, `loss_mask` is all zero: the caller drops
      the row.
    """
    answer = _without_space_after_eos(answer, tokenizer, special)
    ids = encode(prompt, tokenizer), encode(prompt + answer, tokenizer)
    return _prompt_answer(prompt, answer, *ids, tokenizer, special, max_seq_len)


def _prompt_answer(
    prompt: str, answer: str, prompt_ids, full_ids, tokenizer: Any, special: SpecialTokens, max_seq_len: int
) -> TokenizedRow:
    answer_ids = _answer_ids(prompt, prompt_ids, answer, full_ids, tokenizer)
    while answer_ids and answer_ids[-1] == special.eos_id:
        answer_ids.pop()
    prompt_ids = _with_bos(prompt_ids, special)
    return _row(prompt_ids + answer_ids + [special.eos_id], len(prompt_ids), max_seq_len)


def tokenize_text(text: str, tokenizer: Any, special: SpecialTokens, max_seq_len: int) -> TokenizedRow:
    """BOS, text, EOS, each of the two exactly once; all of it is learned but BOS.

    Without a BOS it is the first token that is not learned: nothing stands before it to predict it from.
    """
    return _text(encode(_without_space_after_eos(text, tokenizer, special), tokenizer), special, max_seq_len)


def _text(ids: list[int], special: SpecialTokens, max_seq_len: int) -> TokenizedRow:
    while ids and ids[-1] == special.eos_id:
        ids.pop()
    return _row(_with_bos(ids, special) + [special.eos_id], 1, max_seq_len)


def tokenize_chat(rendered: Rendered, encoding: Any, special: SpecialTokens, max_seq_len: int) -> TokenizedRow:
    """A conversation as its template renders it; what the assistant says is learned.

    - A token is learned if any of its characters is in a span, as in transformers' `return_assistant_tokens_mask`.
    - BOS stands first exactly once if the tokenizer puts one, whether or not the template writes it.
    - A turn ends as the template ends it. Where that is by no special token, EOS ends the last.
    - What follows the last learned token has no effect on what is learned, and is left out.

    Args:
        encoding: the text's ids and their (start, stop) characters, a `tokenizers.Encoding`.
    """
    ids = np.asarray(encoding.ids, np.int64)
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    spans = np.asarray(rendered.spans, np.int64).reshape(-1, 2)
    # The first span that ends behind the token's start, if there is one: does it begin before the token's end?
    following = np.searchsorted(spans[:, 1], offsets[:, 0], side="right")
    first = np.append(spans[:, 0], np.iinfo(np.int64).max)[following]
    learned = offsets[:, 1] > first
    stop = int(np.flatnonzero(learned)[-1]) + 1 if learned.any() else 0
    ids, learned = ids[:stop].tolist(), learned[:stop]
    if special.bos_id is not None:
        kept = _with_bos(ids, special)
        learned = np.append(np.zeros(max(0, len(kept) - len(ids)), bool), learned[max(0, len(ids) - len(kept)) :])
        ids = kept
    if ids and ids[-1] not in special.all_ids:
        ids, learned = ids + [special.eos_id], np.append(learned, True)
    mask = learned[:max_seq_len].astype(np.uint8)
    mask[:1] = 0
    return TokenizedRow(np.asarray(ids[:max_seq_len], np.int32), mask, len(ids) > max_seq_len, rendered.unlearned)


def _answer_ids(prompt: str, prompt_ids: list[int], answer: str, full_ids: list[int], tokenizer: Any) -> list[int]:
    """The answer's ids behind `prompt_ids`, such that both together decode to prompt + answer.

    Where a merge crosses the boundary the answer is encoded by itself. SentencePiece-like tokenizers then put a space
    before it that the text has not; encoded behind a newline, which is dropped again, it has none.
    """
    if full_ids[: len(prompt_ids)] == prompt_ids:
        return full_ids[len(prompt_ids) :]

    alone_ids = encode(answer, tokenizer)
    # Two ways to say the same: a normalising tokenizer does not decode to what was encoded, and the Metaspace decoder
    # drops every space of a text's first token.
    wanted_texts = (_decode(full_ids, tokenizer), _decode(prompt_ids, tokenizer) + answer)
    if _decode(prompt_ids + alone_ids, tokenizer) in wanted_texts:
        return alone_ids
    newline_ids, anchored_ids = encode("\n", tokenizer), encode("\n" + answer, tokenizer)
    if anchored_ids[: len(newline_ids)] == newline_ids:
        anchored_ids = anchored_ids[len(newline_ids) :]
        if _decode(prompt_ids + anchored_ids, tokenizer) in wanted_texts:
            return anchored_ids
    return alone_ids


def _decode(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _without_space_after_eos(text: str, tokenizer: Any, special: SpecialTokens) -> str:
    stripped = text.rstrip()
    return stripped if stripped.endswith(tokenizer.convert_ids_to_tokens(special.eos_id)) else text


def _with_bos(ids: list[int], special: SpecialTokens) -> list[int]:
    if special.bos_id is None:
        return ids
    first = next((i for i, token_id in enumerate(ids) if token_id != special.bos_id), len(ids))
    return [special.bos_id] + ids[first:]


def _row(ids: list[int], first_trained: int, max_seq_len: int) -> TokenizedRow:
    token_ids = np.asarray(ids[:max_seq_len], np.int32)
    loss_mask = np.zeros(len(token_ids), np.uint8)
    loss_mask[max(first_trained, 1) :] = 1
    return TokenizedRow(token_ids, loss_mask, truncated=len(ids) > max_seq_len)


# A row, or what was found in its place.
Row = Mapping[str, Any] | Exception


@dataclass
class RowTokenizer:
    """Source rows to a TokenizedBlock; picklable.

    tokenizer: a transformers tokenizer, or the handle of one, which each process loads once, when first needed.
    max_seq_len: tokens of a row, special ones included, beyond which it is cut.
    on_bad_row: "error" raises the DataError of the first bad row; "skip" counts bad rows and keeps the first messages.
    chat_template: Jinja in place of the tokenizer's own.
    vocabulary: tokens that the model knows; a row with others is bad. None checks nothing.
    """

    tokenizer: Any
    format: PromptAnswer | Text
    max_seq_len: int
    on_bad_row: str = "error"
    chat_template: str | None = None
    vocabulary: int | None = None
    _special: SpecialTokens | None = field(default=None, init=False, repr=False, compare=False)

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
            place: says where the n-th of `rows` comes from; its id by default.

        Raises DataError for a bad row under on_bad_row="error", or if there is no usable tokenizer.
        """
        made = _Made(self, first_row_index, place or (lambda n: f"row {first_row_index + n}"))
        numbered = enumerate(rows)
        while batch := list(itertools.islice(numbered, _BATCH)):
            made.add(batch)
        return made.block()

    def tokenize(self, read: Sequence[dict[str, Any]]) -> list[TokenizedRow | DataError]:
        """Rows as the format reads them, encoded at once; an error for a conversation that cannot be rendered."""
        tokenizer, special = (self.loaded(), self.special) if read else (None, None)
        rows: list[TokenizedRow | DataError | None] = [None] * len(read)
        kinds = ("messages", "answer", "text")
        chats, pairs, texts = ([i for i, row in enumerate(read) if kind in row] for kind in kinds)
        if pairs:
            prompts = [read[i]["prompt"] for i in pairs]
            answers = [_without_space_after_eos(read[i]["answer"], tokenizer, special) for i in pairs]
            ids = encode_all(prompts + [p + a for p, a in zip(prompts, answers, strict=True)], tokenizer)
            for n, i in enumerate(pairs):
                both = ids[n], ids[len(pairs) + n]
                rows[i] = _prompt_answer(prompts[n], answers[n], *both, tokenizer, special, self.max_seq_len)
        if texts:
            ids = encode_all([_without_space_after_eos(read[i]["text"], tokenizer, special) for i in texts], tokenizer)
            for n, i in enumerate(texts):
                rows[i] = _text(ids[n], special, self.max_seq_len)
        for i, row in zip(chats, self._chats([read[i] for i in chats]), strict=True):
            rows[i] = row
        return rows

    def _chats(self, read: Sequence[dict[str, Any]]) -> list[TokenizedRow | DataError]:
        if not read:
            return []
        tokenizer = self.loaded()
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"conversations need a fast tokenizer, with tokenizer.json; got {type(tokenizer).__name__}")
        template = ChatTemplate(tokenizer, self.chat_template)
        rendered = []
        for row in read:
            try:
                rendered.append(template(row["messages"], row["tools"], row["options"]))
            except DataError as error:
                rendered.append(error)
        texts = [each.text for each in rendered if isinstance(each, Rendered)]
        encodings = iter(tokenizer(texts, add_special_tokens=False, verbose=False).encodings if texts else ())
        return [
            tokenize_chat(each, next(encodings), self.special, self.max_seq_len) if isinstance(each, Rendered) else each
            for each in rendered
        ]

    def beyond_vocabulary(self, row: TokenizedRow) -> str | None:
        """What is wrong with a row that has a token the model does not know."""
        if self.vocabulary is None or (largest := int(row.token_ids.max(initial=0))) < self.vocabulary:
            return None
        token = self.loaded().convert_ids_to_tokens(largest)
        return (
            f"token {token!r} has id {largest}, beyond the model's vocabulary of {self.vocabulary}; is this the "
            "model's own tokenizer?"
        )

    def loaded(self) -> Any:
        """The tokenizer itself."""
        return load_tokenizer(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer


# Rows that are read and encoded at once.
_BATCH = 256


class _Where:
    """The place of a row, looked for when it is written: in a file, that may take counting lines."""

    def __init__(self, place: Callable[[int], str], number: int):
        self.place, self.number = place, number

    def __str__(self) -> str:
        return self.place(self.number)


class _Made:
    """A block in the making: rows kept, and what became of the others."""

    def __init__(self, tokenizer: RowTokenizer, first_row_index: int, place: Callable[[int], str]):
        self.tokenizer, self.first, self.place = tokenizer, first_row_index, place
        self.row_ids: list[int] = []
        self.kept: list[TokenizedRow] = []
        self.messages: list[str] = []
        self.dropped_untrained = self.skipped_bad = 0

    def add(self, batch: list[tuple[int, Row]]) -> None:
        read = []
        for number, row in batch:
            try:
                if isinstance(row, Exception):
                    raise DataError(f"{self.place(number)}: {row}; {REMEDY}")
                read.append((number, self.tokenizer.format.read(row, _Where(self.place, number))))
            except DataError as error:
                self._bad(error)
        for (number, _), row in zip(read, self.tokenizer.tokenize([row for _, row in read]), strict=True):
            wrong = str(row) if isinstance(row, DataError) else self.tokenizer.beyond_vocabulary(row)
            if wrong:
                self._bad(DataError(f"{self.place(number)}: {wrong}"))
            elif row.is_trained:
                self.row_ids.append(self.first + number)
                self.kept.append(row)
            else:
                self.dropped_untrained += 1
                self._note(partial(self._untrained, number))

    def _untrained(self, number: int) -> str:
        return (
            f"{self.place(number)}: nothing to train on within max_seq_len {self.tokenizer.max_seq_len}, the prompt "
            "alone fills it; raise max_seq_len or shorten the prompt"
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
        )
