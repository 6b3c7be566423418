"""Text to token ids and the mask of what is learned. No padding, no shifting, no batching.

T is a row's length in tokens, N the number of rows of a block. `loss_mask[t] == 1` if and only if token t is to be
predicted, which is done from position t-1; so `loss_mask[0]` is always 0.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.formats import PromptAnswer, Text
from kithara_ray.sft.tokenizer import SpecialTokens, load_tokenizer

MAX_SAMPLES = 3
ON_BAD_ROW = ("error", "skip")


@dataclass(frozen=True, eq=False)
class TokenizedRow:
    token_ids: np.ndarray  # int32 (T,)
    loss_mask: np.ndarray  # uint8 (T,)
    truncated: bool = False  # tokens beyond max_seq_len were cut off

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
    samples: tuple[str, ...] = ()  # messages about the first of the rows dropped or skipped

    def __len__(self) -> int:
        return len(self.row_ids)

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
    prompt_ids = encode(prompt, tokenizer)
    answer_ids = _answer_ids(prompt, prompt_ids, _without_space_after_eos(answer, tokenizer, special), tokenizer)
    while answer_ids and answer_ids[-1] == special.eos_id:
        answer_ids.pop()
    prompt_ids = _with_bos(prompt_ids, special)
    return _row(prompt_ids + answer_ids + [special.eos_id], len(prompt_ids), max_seq_len)


def tokenize_text(text: str, tokenizer: Any, special: SpecialTokens, max_seq_len: int) -> TokenizedRow:
    """BOS, text, EOS, each of the two exactly once; all of it is learned but BOS.

    Without a BOS it is the first token that is not learned: nothing stands before it to predict it from.
    """
    ids = encode(_without_space_after_eos(text, tokenizer, special), tokenizer)
    while ids and ids[-1] == special.eos_id:
        ids.pop()
    return _row(_with_bos(ids, special) + [special.eos_id], 1, max_seq_len)


def _answer_ids(prompt: str, prompt_ids: list[int], answer: str, tokenizer: Any) -> list[int]:
    """The answer's ids behind `prompt_ids`, such that both together decode to prompt + answer.

    Where a merge crosses the boundary the answer is encoded by itself. SentencePiece-like tokenizers then put a space
    before it that the text has not; encoded behind a newline, which is dropped again, it has none.
    """
    full_ids = encode(prompt + answer, tokenizer)
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


@dataclass
class RowTokenizer:
    """Source rows to a TokenizedBlock; picklable.

    tokenizer: a transformers tokenizer, or the handle of one, which each process loads once, when first needed.
    max_seq_len: tokens of a row, special ones included, beyond which it is cut.
    on_bad_row: "error" raises the DataError of the first bad row; "skip" counts bad rows and keeps the first messages.
    """

    tokenizer: Any
    format: PromptAnswer | Text
    max_seq_len: int
    on_bad_row: str = "error"
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
            self._special = SpecialTokens.of(self._loaded())
        return self._special

    def __call__(self, rows: Sequence[Mapping[str, Any]], first_row_index: int) -> TokenizedBlock:
        """Raises DataError for a bad row under on_bad_row="error", or if there is no usable tokenizer."""
        row_ids, kept, messages = [], [], []
        dropped_untrained = skipped_bad = 0
        for row_index, row in enumerate(rows, start=first_row_index):
            try:
                texts = self.format.read(row, row_index)
            except DataError as error:
                if self.on_bad_row == "error":
                    raise
                skipped_bad += 1
                messages.append(str(error))
                continue
            tokenized = self._tokenize(texts)
            if not tokenized.is_trained:
                dropped_untrained += 1
                messages.append(
                    f"row {row_index}: nothing to train on within max_seq_len {self.max_seq_len}, the prompt "
                    f"alone fills it; raise max_seq_len or shorten the prompt"
                )
                continue
            row_ids.append(row_index)
            kept.append(tokenized)
        return TokenizedBlock(
            row_ids=np.asarray(row_ids, np.int64),
            lengths=np.asarray([len(row.token_ids) for row in kept], np.int32),
            token_ids=np.concatenate([np.empty(0, np.int32), *(row.token_ids for row in kept)]),
            loss_mask=np.concatenate([np.empty(0, np.uint8), *(row.loss_mask for row in kept)]),
            dropped_untrained=dropped_untrained,
            skipped_bad=skipped_bad,
            truncated=sum(row.truncated for row in kept),
            samples=tuple(messages[:MAX_SAMPLES]),
        )

    def _tokenize(self, texts: dict[str, str]) -> TokenizedRow:
        how = (self._loaded(), self.special, self.max_seq_len)
        if isinstance(self.format, PromptAnswer):
            return tokenize_prompt_answer(texts["prompt"], texts["answer"], *how)
        return tokenize_text(texts["text"], *how)

    def _loaded(self) -> Any:
        return load_tokenizer(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer
