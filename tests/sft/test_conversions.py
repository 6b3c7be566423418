"""Formats of other libraries: each row gives the text that transformers gives for the conversation it stands for."""

import json
import re
from pathlib import Path

import pytest

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.tokens.conversions import FORMATS as FORMATS_OF_THE_API
from kithara_ray.sft.tokens.formats import PromptAnswer, Text
from kithara_ray.sft.tokens.tokenize import JOINED, RowTokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = {"role": "system", "content": "be short"}
ASKED, ANSWERED = {"role": "user", "content": "add 1 and 2"}, {"role": "assistant", "content": "3"}
MORE = [{"role": "user", "content": "and 1 + 1?"}, {"role": "assistant", "content": "the answer is 2"}]
TOOL = {"type": "function", "function": {"name": "add"}}
FORMATS = {
    "messages as JSON text": ("messages", {"messages": json.dumps([ASKED, ANSWERED])}, [ASKED, ANSWERED], 1),
    "nulls beside messages": (
        "messages", {"prompt": None, "answer": None, "messages": [ASKED, ANSWERED]}, [ASKED, ANSWERED], 1,
    ),
    "a prompt beside messages": (
        "messages", {"prompt": "add", "messages": [ASKED, ANSWERED]}, [ASKED, ANSWERED], 1,
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "add 1 and 2"}, {"from": "gpt", "value": "3"}]},
        [ASKED, ANSWERED], 1,
    ),
    "sharegpt's system": (
        "sharegpt",
        {"system": "be short", "conversations": [{"from": "user", "value": "add 1 and 2"},
                                                 {"from": "assistant", "value": "3"}]},
        [SYSTEM, ASKED, ANSWERED], 1,
    ),
    "sharegpt's weights": (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "be short"}, {"from": "human", "value": "add 1 and 2"},
                           {"from": "gpt", "value": "3", "weight": 0}, {"from": "human", "value": "and 1 + 1?"},
                           {"from": "gpt", "value": "the answer is 2", "weight": 1}]},
        [SYSTEM, ASKED, ANSWERED, *MORE], 1,
    ),
    "sharegpt's calls": (
        "sharegpt",
        {"tools": json.dumps([TOOL]), "conversations": [
            {"from": "human", "value": "add 1 and 2"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
            {"from": "observation", "value": "3"}, {"from": "gpt", "value": "3"}]},
        [ASKED, {"role": "assistant", "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]},
         {"role": "tool", "content": "3"}, ANSWERED], 2,
    ),
    "alpaca": ("alpaca", {"instruction": "add 1 and 2", "input": "", "output": "3"}, [ASKED, ANSWERED], 1),
    "alpaca's input": (
        "alpaca", {"instruction": "add", "input": "1 and 2", "output": "3"},
        [{"role": "user", "content": "add\n1 and 2"}, ANSWERED], 1,
    ),
    "alpaca's system and history": (
        "alpaca",
        {"instruction": "and 1 + 1?", "input": None, "output": "the answer is 2", "system": "be short",
         "history": [["add 1 and 2", "3"]]},
        [SYSTEM, ASKED, ANSWERED, *MORE], 2,
    ),
    "trl's conversations": (
        "prompt_completion", {"prompt": [SYSTEM, ASKED, ANSWERED, MORE[0]], "completion": [MORE[1]]},
        [SYSTEM, ASKED, ANSWERED, *MORE], 1,
    ),
}  # fmt: skip


def made(tokenizers, row, **how):
    settings = {name: how.pop(name) for name in ("chat_template", "on_bad_row") if name in how}
    return RowTokenizer(tokenizers["chat"], PromptAnswer(**how), 512, **settings)([row], 0)


def learned(tokenizers, block):
    row = next(iter(block.rows()))
    return tokenizers["chat"].decode([i for i, m in zip(row.token_ids, row.loss_mask, strict=True) if m])


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("case", FORMATS)
def test_a_row_is_the_conversation_that_it_stands_for(tokenizers, case, explicit):
    name, row, messages, turns = FORMATS[case]
    block = made(tokenizers, row, format=name if explicit else "auto", chat_template=TEMPLATE)
    reference = tokenizers["chat"].apply_chat_template(
        messages, tools=[TOOL] if "tools" in row else None, chat_template=TEMPLATE, tokenize=False
    )
    (got,) = block.rows()
    # What follows the last learned token is left out.
    assert tokenizers["chat"].decode(got.token_ids) == reference.rstrip("\n")
    said = [m["content"] for m in messages if m["role"] == "assistant" and "content" in m][-turns:]
    assert learned(tokenizers, block).count("<|im_end|>") == turns
    assert all(text in learned(tokenizers, block) for text in said)
    assert "be short" not in learned(tokenizers, block)
    assert block.formats == {name: 1}


@pytest.mark.parametrize(
    ("mapping", "row"),
    [
        ({"messages": "conversations"}, {"conversations": [{"from": "human", "value": "add 1 and 2"},
                                                           {"from": "gpt", "value": "3"}]}),
        ({"conversations": "talk"}, {"talk": [{"from": "human", "value": "add 1 and 2"},
                                              {"from": "gpt", "value": "3"}]}),
        ({"answer": "completion"}, {"prompt": [ASKED], "completion": [ANSWERED]}),
        ({"instruction": "q", "output": "a", "input": "context"}, {"q": "add 1 and 2", "a": "3", "context": None}),
    ],
)  # fmt: skip
def test_columns_of_other_names(tokenizers, mapping, row):
    block = made(tokenizers, row, column_mapping=mapping, chat_template=TEMPLATE)
    assert block.token_ids.tolist() == made(tokenizers, FORMATS["alpaca"][1], chat_template=TEMPLATE).token_ids.tolist()


def test_a_prompt_and_an_answer_as_a_conversation(tokenizers):
    row = {"prompt": "add 1 and 2", "answer": "3", "system": "be short"}
    block = made(tokenizers, row, format="chat", chat_template=TEMPLATE)
    expected = made(tokenizers, {"messages": [SYSTEM, ASKED, ANSWERED]}, chat_template=TEMPLATE)
    assert block.token_ids.tolist() == expected.token_ids.tolist()
    assert block.loss_mask.tolist() == expected.loss_mask.tolist()
    assert block.formats == {"chat": 1}


def test_texts_of_trl_are_joined_as_prompt_and_answer(tokenizers):
    block = made(tokenizers, {"prompt": "1 + 1? ", "completion": "2"})
    expected = made(tokenizers, {"prompt": "1 + 1? ", "answer": "2"})
    assert (block.token_ids.tolist(), block.loss_mask.tolist()) == (
        expected.token_ids.tolist(), expected.loss_mask.tolist(),
    )  # fmt: skip


@pytest.mark.parametrize(("given", "middle"), [("1 and 2", "\n\n### Input:\n1 and 2"), ("", "")])
def test_alpacas_own_prompt(tokenizers, given, middle):
    row = {"instruction": "add", "input": given, "output": "3"}
    read = PromptAnswer(format="alpaca_text").read(row, 0)
    assert read["prompt"].endswith(f"\n\n### Instruction:\nadd{middle}\n\n### Response:")
    assert ("paired with an input" in read["prompt"]) == bool(given)
    assert learned(tokenizers, made(tokenizers, row, format="alpaca_text")) == "3<|im_end|>"


@pytest.mark.parametrize("text_is_marked", [False, True])
def test_prompts_that_pass_a_chat_template_by_are_said(tokenizers, text_is_marked):
    import copy

    tokenizer = copy.deepcopy(tokenizers["chat"])
    tokenizer.chat_template = TEMPLATE
    row = {"prompt": "<|im_start|>user\nhi<|im_end|>\n" if text_is_marked else "hi", "answer": "foo"}
    for name, told in (("auto", not text_is_marked), ("prompt_answer", False)):
        block = RowTokenizer(tokenizer, PromptAnswer(format=name), 64)([row, row], 0)
        assert block.notes == ({JOINED: 2} if told else {})
    assert RowTokenizer(tokenizers["chat"], PromptAnswer(), 64)([row], 0).notes == {}


@pytest.mark.parametrize(("weight", "told"), [(None, False), (1, False), (1.0, False), (0, True), (0.5, True)])
def test_a_rows_weight_is_said(tokenizers, weight, told):
    for row in ({"prompt": "a", "answer": "b"}, {"messages": [ASKED, ANSWERED]}):
        block = made(tokenizers, {**row, "weight": weight}, chat_template=TEMPLATE)
        assert ("column 'weight' has no effect: every row counts the same" in block.notes) == told


BAD = {
    "a speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, "'conversations' message 0 is from 'narra"),
    "not from and value": ({"conversations": [{"who": "x"}]}, "message 0 has no 'from' and 'value', found 'who'"),
    "a call that is no JSON": (
        {"conversations": [{"from": "function_call", "value": "add(1)"}]}, "message 0 is a function_call, but not JSON",
    ),
    "two systems": (
        {"system": "a", "conversations": [{"from": "system", "value": "b"}, {"from": "gpt", "value": "c"}]},
        "column 'system' has text, and the messages begin with one of role 'system' too",
    ),
    "history": ({"instruction": "a", "output": "b", "history": ["c"]}, "column 'history' turn 0 is not [instruction"),
    "no output": ({"instruction": "a", "output": ""}, "column 'output' is empty"),
    "an input that is no text": ({"instruction": "a", "output": "b", "input": 3}, "column 'input' is int, not text"),
    "images": ({"images": ["a.png"], "messages": [ASKED, ANSWERED]}, "column 'images' is not empty; only text is"),
    "a completion that is a number": ({"prompt": "a", "completion": 3}, "column 'completion' is int, neither text"),
    "a blank completion": ({"prompt": "a", "completion": " "}, "column 'completion' is blank"),
    "tools and functions": (
        {"messages": [ASKED, ANSWERED], "tools": [TOOL], "functions": [{"name": "f"}]}, "has both tools and functions",
    ),
    "text that is no JSON": ({"messages": "[{"}, "column 'messages' is str, not a list of messages, nor JSON text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case):
    row, text = BAD[case]
    with pytest.raises(DataError, match=rf"^row 7: .*{re.escape(text)}.*; drop it or pass on_bad_row"):
        PromptAnswer().read(row, 7)


def test_a_format_is_checked():
    with pytest.raises(ConfigError, match=r"format must be one of 'auto', 'prompt_answer', .* got 'chatml'"):
        PromptAnswer(format="chatml")
    with pytest.raises(ConfigError, match="format must be one of 'auto', 'text', got 'chat'"):
        Text(format="chat")
    with pytest.raises(DataError, match=r'row 0: column .messages. message 0 has no role.*; pass format="sharegpt"'):
        PromptAnswer(format="messages").read({"messages": [{"from": "human", "value": "x"}]}, 0)
    with pytest.raises(DataError, match="row 0: no column 'conversations', found 'messages'; give another format"):
        PromptAnswer(format="sharegpt").read({"messages": [ASKED, ANSWERED]}, 0)
    with pytest.raises(ConfigError, match="maps 'answer', but the expected columns are 'conversations', 'system'"):
        PromptAnswer({"answer": "a"}, format="sharegpt")


def test_columns_that_another_format_has_may_hold_anything_beside_prompt_and_answer():
    function = PromptAnswer(custom_formatting_fn=lambda row: {**row, "prompt": "p", "answer": "a"})
    assert function.read({"input": [1, 2], "conversations": [3], "completion": []}, 0) == {"prompt": "p", "answer": "a"}
    assert function.formatting_style == "row"


@pytest.mark.parametrize("style", ["row", "batch"])
def test_a_function_may_return_any_format(style):
    row = {"instruction": "a", "output": "b", "history": [["c", "d"]]}
    function = (lambda row: row) if style == "row" else (lambda batch: {k: list(v) for k, v in batch.items()})
    read = PromptAnswer(custom_formatting_fn=function, formatting_style=style).read(row, 0)
    assert [message["content"] for message in read["messages"]] == ["c", "d", "a", "b"]


def test_the_documentation_has_an_example_of_every_format():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\{.*?\})` \|", page, re.M))
    assert sorted(rows) == sorted(FORMATS_OF_THE_API)
    for name, row in rows.items():
        read = PromptAnswer(format=name).read(json.loads(row), 0)
        found = PromptAnswer().read(json.loads(row), 0).get("format")
        if name in ("sharegpt", "alpaca", "prompt_completion"):
            assert found == read["format"] == name
