import pickle
import random
import re

import numpy as np
import pytest

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.tokens.encode import encode, with_bos
from kithara_ray.sft.tokens.formats import PromptAnswer, Text
from kithara_ray.sft.tokens.tokenize import RowTokenizer
from kithara_ray.sft.tokens.tokenizer import SpecialTokens

LONG = 10_000


@pytest.fixture
def special(tokenizer):
    return SpecialTokens.of(tokenizer)


def tokenize_prompt_answer(prompt, answer, tokenizer, special, max_seq_len):
    return _row({"prompt": prompt, "answer": answer}, PromptAnswer(), tokenizer, special, max_seq_len)


def tokenize_text(text, tokenizer, special, max_seq_len):
    return _row({"text": text}, Text(), tokenizer, special, max_seq_len)


def _row(read, read_as, tokenizer, special, max_seq_len):
    rows = RowTokenizer(tokenizer, read_as, max_seq_len)
    rows._special = special
    (row,) = rows.tokenize([read])
    return row


def encode_prompt(prompt, tokenizer, special):
    """What inference gives the model."""
    return with_bos(encode(prompt, tokenizer), special)


def _decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _trained_text(tokenizer, row):
    """What the trained tokens add to the text before them."""
    before = row.token_ids[row.loss_mask == 0]
    assert row.loss_mask.tolist() == [0] * len(before) + [1] * (len(row.token_ids) - len(before))
    untrained, whole = _decode(tokenizer, before), _decode(tokenizer, row.token_ids)
    assert whole.startswith(untrained)
    return whole.removeprefix(untrained)


def _prompts_and_answers(sentences):
    """Sentences of the tokenizer's language cut anywhere, within words too, then words and characters in any order."""
    for sentence in sentences:
        for cut in range(1, len(sentence)):
            yield sentence[:cut], sentence[cut:]
    rng = random.Random(0)
    words = ["foo", "bar", "foobar", "answer", "42", "\n", " ", ": ", "  ", *sorted(set("".join(sentences)))]
    for _ in range(200):
        yield tuple("".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(2))


def test_trained_tokens_are_the_answer_and_eos(tokenizer, special, sentences, adds_bos):
    crossed = 0
    for prompt, answer in _prompts_and_answers(sentences):
        row = tokenize_prompt_answer(prompt, answer, tokenizer, special, LONG)
        ids, prompt_ids = row.token_ids.tolist(), encode_prompt(prompt, tokenizer, special)

        assert _trained_text(tokenizer, row) == answer + tokenizer.eos_token, (prompt, answer)
        assert ids[: len(prompt_ids)] == prompt_ids, (prompt, answer)
        assert int((row.loss_mask == 0).sum()) == len(prompt_ids)
        assert ids.count(special.eos_id) == 1
        assert ids[-1] == special.eos_id
        assert ids.count(tokenizer.bos_token_id) == adds_bos
        assert (ids[0] == tokenizer.bos_token_id) is adds_bos
        crossed += encode(prompt + answer, tokenizer)[: len(encode(prompt, tokenizer))] != encode(prompt, tokenizer)
    assert crossed > 50, f"only {crossed} rows have a merge across the boundary: the rule is hardly tested"


def test_dtypes(tokenizer, special):
    row = tokenize_prompt_answer("foo", "bar", tokenizer, special, LONG)
    assert (row.token_ids.dtype, row.loss_mask.dtype) == (np.int32, np.uint8)
    assert row.token_ids.shape == row.loss_mask.shape


def test_the_prompt_keeps_its_own_ids(tokenizers):
    tokenizer = tokenizers["chat"]
    special = SpecialTokens.of(tokenizer)
    assert len(encode("foobar", tokenizer)) == 1, "the example needs a merge across the boundary"
    row = tokenize_prompt_answer("foo", "bar", tokenizer, special, LONG)
    assert row.token_ids.tolist() == [*encode("foo", tokenizer), *encode("bar", tokenizer), special.eos_id]


class _Contextual:
    """Writes "b" as 2 at the start of a text and as 3 behind an "a"."""

    ids = {"a": [1], "b": [2], "ab": [1, 3], "\n": [4], "\nb": [4, 2]}  # noqa: RUF012

    def __call__(self, text, **options):
        one = lambda text: list(self.ids[text])  # noqa: E731
        return {"input_ids": one(text) if isinstance(text, str) else [one(each) for each in text]}

    def decode(self, ids, **options):
        return "".join({1: "a", 2: "b", 3: "b", 4: "\n"}[int(i)] for i in ids)

    def convert_ids_to_tokens(self, token_id):
        return "<eos>"


def test_the_tokens_of_the_whole_text_are_used_where_the_prompt_is_their_prefix():
    row = tokenize_prompt_answer("a", "b", _Contextual(), SpecialTokens(bos_id=None, eos_id=9, pad_id=9), LONG)
    assert row.token_ids.tolist() == [1, 3, 9]


def test_an_answer_encoded_by_itself_gets_no_space(tokenizers):
    """SentencePiece puts one before every text, which inside a word would be a space too many."""
    tokenizer = tokenizers["sentencepiece"]
    special = SpecialTokens.of(tokenizer)
    prompt, answer = "the ans", "wer"
    assert encode(prompt + answer, tokenizer)[: len(encode(prompt, tokenizer))] != encode(prompt, tokenizer)
    assert tokenizer.convert_ids_to_tokens(encode(answer, tokenizer))[0].startswith("▁")
    row = tokenize_prompt_answer(prompt, answer, tokenizer, special, LONG)
    assert _decode(tokenizer, row.token_ids) == "<bos> the answer<eos>"


def test_bos_in_the_text_is_not_doubled(tokenizer, special, adds_bos):
    bos = tokenizer.bos_token
    if adds_bos:
        for text in (bos, bos + bos):
            row = tokenize_prompt_answer(text + "foo", "bar", tokenizer, special, LONG)
            assert row.token_ids.tolist().count(special.bos_id) == 1
            assert row.token_ids[0] == special.bos_id
    else:  # there it is a chat marker, and stays as often as it is written
        row = tokenize_prompt_answer(bos + bos + "foo", "bar", tokenizer, special, LONG)
        assert row.token_ids.tolist().count(tokenizer.bos_token_id) == 2


def test_eos_in_the_answer_is_not_doubled(tokenizer, special):
    plain = tokenize_prompt_answer("foo: ", "bar", tokenizer, special, LONG)
    for ending in (tokenizer.eos_token, tokenizer.eos_token + "\n", tokenizer.eos_token * 2):
        row = tokenize_prompt_answer("foo: ", "bar" + ending, tokenizer, special, LONG)
        assert row.token_ids.tolist() == plain.token_ids.tolist(), ending
        assert row.loss_mask.tolist() == plain.loss_mask.tolist(), ending


def test_white_space_at_the_end_of_an_answer_stays(tokenizer, special):
    row = tokenize_prompt_answer("foo: ", "bar\n", tokenizer, special, LONG)
    assert _trained_text(tokenizer, row) == "bar\n" + tokenizer.eos_token


def test_eos_at_the_end_of_the_prompt_stays_and_is_not_trained(tokenizer, special):
    row = tokenize_prompt_answer("foo" + tokenizer.eos_token, "bar", tokenizer, special, LONG)
    assert row.token_ids.tolist().count(special.eos_id) == 2
    # Behind a special token, as before every text, SentencePiece itself puts a space.
    assert _trained_text(tokenizer, row).lstrip() == "bar" + tokenizer.eos_token


def test_markers_become_special_tokens(tokenizers):
    tokenizer = tokenizers["chat"]
    special = SpecialTokens.of(tokenizer)
    row = tokenize_prompt_answer("<|im_start|>user\nfoo<|im_end|>\n<|im_start|>", "bar", tokenizer, special, LONG)
    assert row.token_ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert row.token_ids.tolist().count(special.eos_id) == 2


def test_truncation_keeps_the_left(tokenizer, special):
    whole = tokenize_prompt_answer("the answer is ", "foobar 42", tokenizer, special, LONG)
    length = len(whole.token_ids)
    assert not whole.truncated
    assert not tokenize_prompt_answer("the answer is ", "foobar 42", tokenizer, special, length).truncated
    cut = tokenize_prompt_answer("the answer is ", "foobar 42", tokenizer, special, length - 1)
    assert cut.truncated
    assert cut.is_trained
    assert cut.token_ids.tolist() == whole.token_ids[:-1].tolist()
    assert cut.loss_mask.tolist() == whole.loss_mask[:-1].tolist()
    assert special.eos_id not in cut.token_ids


def test_an_answer_cut_off_entirely_is_untrained(tokenizer, special):
    prompt_tokens = len(encode_prompt("the answer is ", tokenizer, special))
    cut = tokenize_prompt_answer("the answer is ", "42", tokenizer, special, prompt_tokens)
    assert len(cut.token_ids) == prompt_tokens
    assert not cut.is_trained
    assert tokenize_prompt_answer("the answer is ", "42", tokenizer, special, prompt_tokens + 1).loss_mask.sum() == 1


def test_an_empty_prompt(tokenizer, special, adds_bos):
    """Without a BOS nothing stands before the answer's first token, so nothing can predict it."""
    row = tokenize_prompt_answer("", "foo 42", tokenizer, special, LONG)
    assert row.loss_mask.tolist() == [0] + [1] * (len(row.token_ids) - 1)
    assert (
        _decode(tokenizer, row.token_ids).split()
        == _decode(
            tokenizer, [*([special.bos_id] if adds_bos else []), *encode("foo 42", tokenizer), special.eos_id]
        ).split()
    )


def test_text_trains_all_but_the_first_token(tokenizer, special, adds_bos):
    row = tokenize_text("foobar: the answer", tokenizer, special, LONG)
    bos = [special.bos_id] if adds_bos else []
    assert row.token_ids.tolist() == [*bos, *encode("foobar: the answer", tokenizer), special.eos_id]
    assert row.loss_mask.tolist() == [0] + [1] * (len(row.token_ids) - 1)


def test_text_that_has_bos_and_eos(tokenizer, special, adds_bos):
    plain = tokenize_text("foobar", tokenizer, special, LONG)
    bos = tokenizer.bos_token if adds_bos else ""
    written = tokenize_text(f"{bos}foobar{tokenizer.eos_token}\n", tokenizer, special, LONG)
    assert _decode(tokenizer, written.token_ids) == _decode(tokenizer, plain.token_ids)
    assert written.token_ids.tolist().count(special.eos_id) == 1


def test_text_is_truncated(tokenizer, special):
    row = tokenize_text("the answer, the answer!", tokenizer, special, 3)
    assert (len(row.token_ids), row.truncated) == (3, True)


# ---- blocks

ROWS = [
    {"prompt": "the answer is ", "answer": "42"},
    {"prompt": "foo", "answer": "bar"},
    {"prompt": "", "answer": "Paris."},
]


def test_block_holds_the_rows_in_order(tokenizer, special):
    block = RowTokenizer(tokenizer, PromptAnswer(), max_seq_len=64)(ROWS, first_row_index=100)
    assert block.row_ids.tolist() == [100, 101, 102]
    assert len(block) == 3
    dtypes = {name: getattr(block, name).dtype for name in ("row_ids", "lengths", "token_ids", "loss_mask")}
    assert dtypes == {"row_ids": np.int64, "lengths": np.int32, "token_ids": np.int32, "loss_mask": np.uint8}
    for row, source in zip(block.rows(), ROWS, strict=True):
        expected = tokenize_prompt_answer(source["prompt"], source["answer"], tokenizer, special, 64)
        assert row.token_ids.tolist() == expected.token_ids.tolist()
        assert row.loss_mask.tolist() == expected.loss_mask.tolist()


def test_block_of_text(tokenizer, special):
    block = RowTokenizer(tokenizer, Text(), max_seq_len=64)([{"text": "foobar"}], 0)
    assert block.token_ids.tolist() == tokenize_text("foobar", tokenizer, special, 64).token_ids.tolist()


def test_empty_block(tokenizer):
    block = RowTokenizer(tokenizer, PromptAnswer(), max_seq_len=64)([], 5)
    assert len(block) == 0
    assert [array.shape for array in (block.row_ids, block.lengths, block.token_ids, block.loss_mask)] == [(0,)] * 4
    assert (block.token_ids.dtype, block.loss_mask.dtype) == (np.int32, np.uint8)
    assert list(block.rows()) == []


def test_empty_block_needs_no_tokenizer():
    assert len(RowTokenizer("/nowhere", PromptAnswer(), max_seq_len=64)([], 5)) == 0


def test_a_bad_row_raises(tokenizer):
    rows = [*ROWS, {"prompt": "p", "answer": None}]
    with pytest.raises(DataError, match=r"^row 17: column 'answer' is null; drop it or pass on_bad_row=\"skip\"$"):
        RowTokenizer(tokenizer, PromptAnswer(), max_seq_len=64)(rows, 14)


def test_bad_rows_are_skipped_and_counted(tokenizer):
    bad = {"prompt": "p", "answer": None}
    rows = [bad, ROWS[0], bad, bad, bad]
    block = RowTokenizer(tokenizer, PromptAnswer(), max_seq_len=64, on_bad_row="skip")(rows, 10)
    assert block.row_ids.tolist() == [11]
    assert (block.skipped_bad, block.dropped_untrained, block.truncated) == (4, 0, 0)
    assert [re.match(r"row \d+", sample)[0] for sample in block.samples] == ["row 10", "row 12", "row 13"]


def test_untrained_rows_are_dropped_and_truncated_ones_counted(tokenizer):
    digits = "12345678901234567890"
    rows = [{"prompt": digits, "answer": "4"}, {"prompt": "", "answer": digits}, ROWS[1]]
    block = RowTokenizer(tokenizer, PromptAnswer(), max_seq_len=9)(rows, 0)
    assert (block.skipped_bad, block.dropped_untrained, block.truncated) == (0, 1, 1)
    assert block.row_ids.tolist() == [1, 2]
    assert block.samples == (
        "row 0: nothing to train on within max_seq_len 9, because the prompt fills it; raise max_seq_len or shorten "
        "the prompt",
    )


def test_pickles_with_a_handle_and_with_a_tokenizer(tokenizer, tokenizer_directories, kind):
    by_handle = RowTokenizer(str(tokenizer_directories[kind]), PromptAnswer(), max_seq_len=64)
    assert len(pickle.dumps(by_handle)) < 1000
    expected = RowTokenizer(tokenizer, PromptAnswer(), max_seq_len=64)(ROWS, 0)
    for made in (by_handle, RowTokenizer(tokenizer, PromptAnswer(), max_seq_len=64)):
        block = pickle.loads(pickle.dumps(made))(ROWS, 0)
        assert block.token_ids.tolist() == expected.token_ids.tolist()
        assert made.pad_id == SpecialTokens.of(tokenizer).pad_id
    by_handle(ROWS, 0)
    assert len(pickle.dumps(by_handle)) < 1000, "what was loaded must not travel"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_seq_len": 1}, "max_seq_len must be an integer >= 2, got 1"),
        ({"max_seq_len": True}, "max_seq_len must be an integer >= 2, got True"),
        ({"max_seq_len": 8.0}, "max_seq_len must be an integer >= 2, got 8.0"),
        ({"on_bad_row": "drop"}, "on_bad_row must be one of ('error', 'skip'), got 'drop'"),
        ({"tokenizer": None}, "tokenizer must be a handle or a tokenizer, got NoneType"),
        ({"format": "sft"}, "format must be PromptAnswer or Text, got str"),
    ],
)
def test_arguments_are_checked(arguments, text):
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        RowTokenizer(**{"tokenizer": "hf://a/b", "format": PromptAnswer(), "max_seq_len": 8} | arguments)
