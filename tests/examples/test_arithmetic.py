import re

import arithmetic
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

# As SmolLM2 (the end of turn is EOS) and as Gemma (it is not), with the white space that templates write behind it.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _tokenizer(eos, template):
    tokenizer = Tokenizer(models.WordLevel({eos: 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=template)


@pytest.fixture(scope="module")
def chatml():
    return _tokenizer("<|im_end|>", CHATML)


def _question(row):
    return re.search(r"problem: (\d+ [+-] \d+) =", row["prompt"])[1]


def test_no_question_stands_twice(chatml):
    train, held_out = arithmetic.make_rows(500, 100, 0, chatml)
    assert (len(train), len(held_out)) == (500, 100)
    questions = {_question(row) for row in train}
    assert len(questions) == 500
    assert len({_question(row) for row in held_out}) == 100
    assert questions.isdisjoint(_question(row) for row in held_out)


def test_the_largest_set_that_is_offered(chatml):
    entries = arithmetic._distinct_entries(arithmetic.MAX_QUESTIONS, seed=1)
    assert len({entry["question"] for entry in entries}) == arithmetic.MAX_QUESTIONS


def test_too_many_questions(chatml):
    with pytest.raises(ValueError, match="at most 8000 questions in all, got 8000 \\+ 1"):
        arithmetic.make_rows(8000, 1, 0, chatml)


def test_rows_are_a_function_of_the_arguments(chatml):
    train, held_out = arithmetic.make_rows(50, 20, 3, chatml)
    assert arithmetic.make_rows(50, 20, 3, chatml) == (train, held_out)
    longer, same_held_out = arithmetic.make_rows(80, 20, 3, chatml)
    assert (longer[:50], same_held_out) == (train, held_out)
    assert arithmetic.make_rows(50, 20, 4, chatml)[0] != train


def test_what_a_row_holds(chatml):
    train, held_out = arithmetic.make_rows(50, 5, 0, chatml)
    assert {tuple(row) for row in train} == {("prompt", "answer")}
    assert {tuple(row) for row in held_out} == {("prompt", "answer", "entry")}
    for row in train + held_out:
        left, operator, right = _question(row).split()
        assert row["prompt"].startswith(
            "<|im_start|>system\nGive the number.<|im_end|>\n<|im_start|>user\nState the final answer"
        )
        assert row["prompt"].endswith("=<|im_end|>\n<|im_start|>assistant\n")
        assert row["answer"] == str(int(left) + int(right) if operator == "+" else int(left) - int(right))
        assert max(len(left), len(right)) <= 2


def test_an_end_of_turn_that_is_not_eos_belongs_to_the_answer(chatml):
    gemma = _tokenizer("<eos>", GEMMA)
    assert arithmetic.end_of_turn(chatml) == ""
    assert arithmetic.end_of_turn(gemma) == "<end_of_turn>"
    (row,), _ = arithmetic.make_rows(1, 0, 0, gemma)
    assert re.fullmatch(r"-?\d+<end_of_turn>", row["answer"])


def test_score(chatml):
    _, held_out = arithmetic.make_rows(0, 60, 0, chatml)
    for row in held_out:
        truth, entry = row["answer"], row["entry"]
        assert arithmetic.score(truth, entry)
        assert arithmetic.score(f" {truth}\n", entry)
        wrong = [str(int(truth) + 1), str(int(truth) + 10), "", "no", f"1{truth}", f"{truth} or so", f"is {truth}"]
        wrong += [str(-int(truth))] if int(truth) else []
        for text in wrong:
            assert not arithmetic.score(text, entry), (text, truth)
