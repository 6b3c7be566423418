"""Convert one row's text to token ids and a mask of trained tokens; see `blocks`. No padding, no shifting.

Many texts are encoded together, because a fast tokenizer then takes a fraction of the time. These functions therefore
build a row from ids that already exist.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kithara_ray.sft.batches.blocks import TokenizedRow
from kithara_ray.sft.tokens.chat import Rendered
from kithara_ray.sft.tokens.tokenizer import SpecialTokens


def encode(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of exactly this text. Special tokens written in it (chat markers) become special tokens."""
    # verbose=False, because rows longer than the tokenizer's model_max_length are cut here, not by the model.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_all(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Encode all texts together: a fast tokenizer then takes a fraction of the time."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def without_space_after_eos(text: str, tokenizer: Any, special: SpecialTokens) -> str:
    """Remove the white space that chat templates put after a final EOS."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(tokenizer.convert_ids_to_tokens(special.eos_id)) else text


def with_bos(ids: list[int], special: SpecialTokens) -> list[int]:
    """Put BOS first exactly once, if this tokenizer adds one."""
    return put_first(special.bos_id, ids)


def put_first(bos_id: int | None, ids: list[int]) -> list[int]:
    """Put `bos_id` before ids, exactly once; None adds nothing."""
    if bos_id is None:
        return ids
    first = next((i for i, token_id in enumerate(ids) if token_id != bos_id), len(ids))
    return [bos_id] + ids[first:]


def prompt_answer_row(
    prompt: str,
    answer: str,
    prompt_ids: list[int],
    full_ids: list[int],
    tokenizer: Any,
    special: SpecialTokens,
    max_seq_len: int,
) -> TokenizedRow:
    """Build a row of BOS, prompt, answer, EOS; the answer and EOS are trained.

    - The row begins with the prompt's own ids, as inference sees them, even if prompt + answer would merge across the
      boundary.
    - BOS is first exactly once if the tokenizer adds one, even if the text begins with it (rendered chat templates do).
      EOS is last exactly once, even if the answer ends with it.
    - The row is cut on the right at `max_seq_len`. If nothing of the answer is left, `loss_mask` is all zero and the
      caller drops the row.

    Args:
        answer: as returned by `without_space_after_eos`.
        prompt_ids, full_ids: ids of the prompt, and of prompt and answer as one text, from `encode`.
    """
    answer_ids = _answer_ids(prompt, prompt_ids, answer, full_ids, tokenizer)
    while answer_ids and answer_ids[-1] == special.eos_id:
        answer_ids.pop()
    prompt_ids = with_bos(prompt_ids, special)
    return _row(prompt_ids + answer_ids + [special.eos_id], len(prompt_ids), max_seq_len)


def text_row(ids: list[int], special: SpecialTokens, max_seq_len: int) -> TokenizedRow:
    """Build a row of BOS, text, EOS, with BOS and EOS exactly once; all tokens except BOS are trained.

    Without a BOS, the first token is not trained, because no token precedes it from which to predict it.

    Args:
        ids: ids from `encode` of the text that `without_space_after_eos` returned.
    """
    while ids and ids[-1] == special.eos_id:
        ids.pop()
    return _row(with_bos(ids, special) + [special.eos_id], 1, max_seq_len)


def chat_row(rendered: Rendered, encoding: Any, special: SpecialTokens, max_seq_len: int) -> TokenizedRow:
    """Build a row from a rendered conversation; the assistant's text is trained.

    - A token is trained if any of its characters is in a span, as in transformers' `return_assistant_tokens_mask`.
    - BOS is first exactly once if the tokenizer adds one, even if the template writes it.
    - A turn ends as the template ends it. If the template uses no special token for that, EOS ends the last turn.
    - Tokens after the last trained one have no effect on training, and are left out.

    Args:
        encoding: the text's ids and their (start, stop) characters, a `tokenizers.Encoding`.
    """
    ids = np.asarray(encoding.ids, np.int64)
    offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    spans = np.asarray(rendered.spans, np.int64).reshape(-1, 2)
    # Find the first span that ends after the token's start, then test if it begins before the token's end.
    following = np.searchsorted(spans[:, 1], offsets[:, 0], side="right")
    first = np.append(spans[:, 0], np.iinfo(np.int64).max)[following]
    learned = offsets[:, 1] > first
    stop = int(np.flatnonzero(learned)[-1]) + 1 if learned.any() else 0
    ids, learned = ids[:stop].tolist(), learned[:stop]
    if special.bos_id is not None:
        kept = with_bos(ids, special)
        learned = np.append(np.zeros(max(0, len(kept) - len(ids)), bool), learned[max(0, len(ids) - len(kept)) :])
        ids = kept
    if ids and ids[-1] not in special.all_ids:
        ids, learned = ids + [special.eos_id], np.append(learned, True)
    mask = learned[:max_seq_len].astype(np.uint8)
    mask[:1] = 0
    return TokenizedRow(
        np.asarray(ids[:max_seq_len], np.int32),
        mask,
        truncated=len(ids) > max_seq_len,
        unlearned=rendered.unlearned,
        notes=rendered.notes,
    )


def _answer_ids(prompt: str, prompt_ids: list[int], answer: str, full_ids: list[int], tokenizer: Any) -> list[int]:
    """Return the answer's ids to follow `prompt_ids`, so that both together decode to prompt + answer.

    If a merge crosses the boundary, the answer is encoded separately. SentencePiece-like tokenizers then add a space
    before it that the text does not have. Encoding the answer after a newline, which is then removed, avoids this.
    """
    if full_ids[: len(prompt_ids)] == prompt_ids:
        return full_ids[len(prompt_ids) :]

    alone_ids = encode(answer, tokenizer)
    # Either text is correct: a normalising tokenizer does not decode to the encoded text, and the Metaspace decoder
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


def _row(ids: list[int], first_trained: int, max_seq_len: int) -> TokenizedRow:
    token_ids = np.asarray(ids[:max_seq_len], np.int32)
    loss_mask = np.zeros(len(token_ids), np.uint8)
    loss_mask[max(first_trained, 1) :] = 1
    return TokenizedRow(token_ids, loss_mask, truncated=len(ids) > max_seq_len)
