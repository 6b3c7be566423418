import math
import re

import numpy as np
import pytest

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.tokens.formats import PromptAnswer, Text

ROW = {"question": "2 + 2?", "response": "4", "id": 7}


def _error(text):
    return pytest.raises(DataError, match=f"^{re.escape(text)}$")


def test_reads_prompt_and_answer():
    assert PromptAnswer().read({"prompt": "p", "answer": "a", "more": 1}, 0) == {"prompt": "p", "answer": "a"}


def test_reads_text():
    assert Text(column_mapping={"text": "body"}).read({"body": "b"}, 0) == {"text": "b"}


def test_column_mapping_goes_from_expected_name_to_source():
    mapped = PromptAnswer(column_mapping={"prompt": "question", "answer": "response"})
    assert mapped.read(ROW, 0) == {"prompt": "2 + 2?", "answer": "4"}


def test_part_of_a_column_mapping():
    assert PromptAnswer(column_mapping={"answer": "id"}).read({"prompt": "p", "id": "a"}, 0)["answer"] == "a"


def test_column_mapping_the_wrong_way_round():
    text = (
        "column_mapping maps 'question', but the expected columns are 'prompt', 'answer', "
        "'messages', 'tools', 'chat_template_kwargs', 'functions', 'system', 'completion', 'conversations', "
        "'instruction', 'output', 'input', 'history'; it goes from expected name "
        'to source column, e.g. {"prompt": "<the column that holds it>"}'
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        PromptAnswer(column_mapping={"question": "prompt"})


def test_formatting_style_is_checked():
    text = "formatting_style must be one of ('auto', 'row', 'batch'), got 'x'"
    with pytest.raises(ConfigError, match=re.escape(text)):
        PromptAnswer(formatting_style="x")


def test_custom_formatting_fn_is_checked():
    with pytest.raises(ConfigError, match="custom_formatting_fn must be callable, got str"):
        PromptAnswer(custom_formatting_fn="upper")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (None, "row 17: column 'answer' is null; drop it or pass on_bad_row=\"skip\""),
        (math.nan, "row 17: column 'answer' is null; drop it or pass on_bad_row=\"skip\""),
        ("", "row 17: column 'answer' is empty; drop it or pass on_bad_row=\"skip\""),
        (" \n", "row 17: column 'answer' is blank; drop it or pass on_bad_row=\"skip\""),
        (
            4,
            "row 17: column 'answer' is int, not text; convert it in custom_formatting_fn, or drop it or pass "
            'on_bad_row="skip"',
        ),
        (
            b"4",
            "row 17: column 'answer' is bytes, not text; convert it in custom_formatting_fn, or drop it or pass "
            'on_bad_row="skip"',
        ),
        (
            "a\ud800b",
            "row 17: column 'answer' is not valid Unicode at character 1; drop it or pass on_bad_row=\"skip\"",
        ),
    ],
)
def test_bad_answers(answer, text):
    with _error(text):
        PromptAnswer().read({"prompt": "p", "answer": answer}, 17)


def test_the_source_column_is_named():
    with _error("row 3: column 'response' is null; drop it or pass on_bad_row=\"skip\""):
        PromptAnswer(column_mapping={"answer": "response"}).read({"prompt": "p", "response": None}, 3)


def test_missing_column_lists_what_there_is():
    with _error(
        "row 0: no column 'prompt', found 'question', 'response', 'id'; "
        'pass column_mapping={"prompt": "<the column that holds it>"}'
    ):
        PromptAnswer().read(ROW, 0)


def test_a_row_is_a_dict():
    with _error("row 2: expected a dict of columns, got str"):
        Text().read("text", 2)


def test_a_prompt_may_be_empty_but_not_null():
    assert PromptAnswer().read({"prompt": "", "answer": "a"}, 0)["prompt"] == ""
    with _error("row 0: column 'prompt' is null; drop it or pass on_bad_row=\"skip\""):
        PromptAnswer().read({"prompt": None, "answer": "a"}, 0)


def _row_style(row):
    return {"prompt": f"Q: {row['question']}", "answer": row["response"]}


def _batch_style(batch):
    return {"prompt": [f"Q: {question}" for question in batch["question"]], "answer": batch["response"]}


def _batch_style_arrays(batch):
    return {"prompt": np.array(["Q: " + batch["question"][0]]), "answer": np.array(batch["response"])}


def _batch_style_that_raises_on_a_row(batch):
    pairs = zip(batch["question"], batch["id"], strict=True)
    return {"prompt": [f"Q: {question}" for question, _ in pairs], "answer": batch["response"]}


@pytest.mark.parametrize(
    ("function", "style"),
    [
        (_row_style, "row"),
        (_batch_style, "batch"),
        (_batch_style_arrays, "batch"),
        (_batch_style_that_raises_on_a_row, "batch"),
    ],
)
@pytest.mark.parametrize("explicit", [False, True])
def test_row_and_batch_styles(function, style, explicit):
    formatted = PromptAnswer(custom_formatting_fn=function, formatting_style=style if explicit else "auto")
    for index in range(2):
        assert formatted.read(ROW, index) == {"prompt": "Q: 2 + 2?", "answer": "4"}
    assert formatted.formatting_style == style


def test_the_style_is_decided_once():
    calls = []

    def function(batch):
        calls.append(batch)
        return _batch_style(batch)

    formatted = PromptAnswer(custom_formatting_fn=function)
    formatted.read(ROW, 0)
    formatted.read(ROW, 1)
    assert [type(call["question"]) for call in calls] == [str, list, list]


def test_a_function_that_fits_both_is_given_rows():
    formatted = PromptAnswer(custom_formatting_fn=lambda row: {"prompt": row["question"], "answer": row["response"]})
    assert formatted.read(ROW, 0) == {"prompt": "2 + 2?", "answer": "4"}
    assert formatted.formatting_style == "row"


def test_a_row_that_decides_nothing_leaves_it_to_the_next():
    formatted = PromptAnswer(
        custom_formatting_fn=lambda row: {"prompt": row["question"].strip(), "answer": str(int(row["response"]))}
    )
    with pytest.raises(DataError, match=r"row 0: custom_formatting_fn, given the row, raised TypeError: .*as a batch"):
        formatted.read({"question": "q", "response": None}, 0)
    assert formatted.formatting_style == "auto"
    assert formatted.read(ROW, 1)["answer"] == "4"


def test_unwanted_columns_may_hold_lists():
    formatted = PromptAnswer(custom_formatting_fn=lambda row: {**row, "prompt": row["question"], "answer": "4"})
    assert formatted.read({**ROW, "scores": [1, 2]}, 0)["prompt"] == "2 + 2?"


def test_the_mapping_is_applied_to_what_the_function_returns():
    formatted = PromptAnswer(
        column_mapping={"prompt": "in", "answer": "out"},
        custom_formatting_fn=lambda row: {"in": row["question"], "out": row["response"]},
    )
    assert formatted.read(ROW, 0) == {"prompt": "2 + 2?", "answer": "4"}


def test_the_function_cannot_change_the_source_row():
    row = dict(ROW)
    PromptAnswer(custom_formatting_fn=lambda row: row.update(prompt="p", answer="a") or row).read(row, 0)
    assert row == ROW


def test_errors_of_the_function_name_the_row():
    with _error("row 5: custom_formatting_fn, given the row, raised KeyError: 'nope'"):
        PromptAnswer(custom_formatting_fn=lambda row: {"prompt": row["nope"]}, formatting_style="row").read(ROW, 5)


def test_the_function_returns_a_dict():
    with _error("row 5: custom_formatting_fn, given the row, returned str, not a dict"):
        PromptAnswer(custom_formatting_fn=lambda row: "text", formatting_style="row").read(ROW, 5)


def test_a_batch_function_returns_one_row_for_one():
    with _error(
        "row 5: custom_formatting_fn, given a batch of one, returned 2 values for column 'answer'; "
        "return a list of one value a row"
    ):
        PromptAnswer(
            custom_formatting_fn=lambda batch: {"prompt": ["p"], "answer": ["a", "b"]}, formatting_style="batch"
        ).read(ROW, 5)


def test_a_row_function_returns_no_lists():
    with _error(
        "row 5: custom_formatting_fn, given the row, returned a list for column 'answer'; "
        'return text, or pass formatting_style="batch"'
    ):
        PromptAnswer(custom_formatting_fn=lambda row: {"prompt": "p", "answer": ["a"]}, formatting_style="row").read(
            ROW, 5
        )


def test_a_column_the_function_forgot():
    with _error(
        "row 5: no column 'answer', found 'prompt'; pass column_mapping={\"answer\": \"<the column that holds it>\"}"
    ):
        PromptAnswer(custom_formatting_fn=lambda row: {"prompt": "p"}).read(ROW, 5)
