"""Conversations through chat templates: what is learned is what the assistant says, as transformers marks it."""

import re
import time

import numpy as np
import pytest

from kithara_ray.errors import DataError
from kithara_ray.sft.tokens.chat import ChatTemplate
from kithara_ray.sft.tokens.formats import PromptAnswer
from kithara_ray.sft.tokens.tokenize import RowTokenizer

# The shapes of the families' own templates; {G} and {E} mark what the assistant says where the template can.
CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{G}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}<|im_end|>{E}{{ '\\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<x>{{ m.role }}</x>\n\n"
    "{% if m.role == 'assistant' %}{G}{{ m.content | trim }}"
    "{{ eos_token }}{E}{% else %}{{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<x>assistant</x>\n\n{% endif %}"
)
# The system's message is put before the user's, roles are renamed, turns end in a token that is not EOS.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set pre = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set pre = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}[{{ 'model' if m.role == 'assistant' else 'user' }}]\n"
    "{% if m.role == 'assistant' %}{G}{{ m.content }}<end_of_turn>{E}{{ '\\n' }}"
    "{% else %}{{ (pre if loop.first else '') + m.content }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[model]\n{% endif %}"
)
TEMPLATES = {"chat": CHATML, "llama3": LLAMA3, "sentencepiece": GEMMA}


def template(kind, marked):
    opening, closing = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return TEMPLATES[kind].replace("{G}", opening).replace("{E}", closing)


def conversation(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


CONVERSATIONS = [
    conversation("the question", "the answer is 42"),
    conversation("foo", "bar", "what is 12 + 7?", "19", "and 1 + 1?", " 2 \n"),
    conversation("foo", "foobar: foobars", system="answer the questions"),
    conversation("who?", "\n\nnew lines first"),
    conversation("foo", "bar", "not answered"),
]


def tokenize(tokenizer, source, messages, max_seq_len=10_000, **row):
    made = RowTokenizer(tokenizer, PromptAnswer(), max_seq_len, chat_template=source)
    return next(iter(made([{"messages": messages, **row}], 0).rows()))


def said(tokenizer, row):
    """The text of each stretch of learned tokens."""
    edges = np.flatnonzero(np.diff(np.pad(row.loss_mask, 1).astype(int))).reshape(-1, 2)
    return [tokenizer.decode(row.token_ids[a:b], skip_special_tokens=False) for a, b in edges]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_mask_is_transformers_own_whether_or_not_the_template_marks(tokenizer, kind, adds_bos, messages, marked):
    reference = tokenizer.apply_chat_template(
        messages,
        chat_template=template(kind, marked=True),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    ids, mask = reference["input_ids"], reference["assistant_masks"]
    stop = max(i for i, learned in enumerate(mask) if learned) + 1  # what follows is left out
    row = tokenize(tokenizer, template(kind, marked), messages)
    assert row.token_ids.tolist() == ids[:stop]
    assert row.loss_mask.tolist() == mask[:stop]
    assert row.token_ids.tolist().count(tokenizer.bos_token_id) == (
        adds_bos or sum(ids[:stop].count(i) for i in [tokenizer.bos_token_id])
    )


def test_what_is_said_is_learned_with_the_end_of_its_turn(tokenizer, kind):
    row = tokenize(tokenizer, template(kind, False), CONVERSATIONS[1])
    ending = {"chat": "<|im_end|>", "llama3": "<|end_of_text|>", "sentencepiece": "<end_of_turn>"}[kind]
    texts = [text.lstrip() for text in said(tokenizer, row)]
    assert texts[:2] == [f"bar{ending}", f"19{ending}"]
    assert re.fullmatch(rf"2\s*{re.escape(ending)}", texts[2])


def test_bos_once_though_the_template_writes_none_and_eos_where_it_ends_in_nothing(tokenizers):
    plain = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    for kind, bos in (("llama3", 1), ("sentencepiece", 1), ("chat", 0)):
        tokenizer = tokenizers[kind]
        row = tokenize(tokenizer, plain, conversation("foo", "bar"))
        assert row.token_ids.tolist().count(tokenizer.bos_token_id) == bos
        assert row.token_ids[-1] == tokenizer.eos_token_id
        assert row.loss_mask[-1] == 1
        assert row.token_ids.tolist().count(tokenizer.eos_token_id) == 1


def test_tools_and_calls(tokenizers):
    tokenizer = tokenizers["chat"]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "what is 1 + 1?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "it is 2"},
    ]
    schema = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    for tools in (schema, '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'):
        row = tokenize(tokenizer, template("chat", False), messages, tools=tools)
        assert said(tokenizer, row) == [
            '<call>{"name": "add", "arguments": {"a": 1}}<|im_end|>',
            "it is 2<|im_end|>",
        ]
        assert "tools" in tokenizer.decode(row.token_ids[:10])


# Thinking is shown in the last turn alone.
THINKING = CHATML.replace(
    "{{ m.content or '' }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
).replace("{G}", "").replace("{E}", "")  # fmt: skip
# As Mistral's: the system's message stands before the last of the user's.
SYSTEM_LAST = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{{ messages[0].content + ' ' if loop.index0 == ns.last }}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (THINKING, conversation("1?", "<think>a</think>one", "2?", "<think>b</think>two")),
        (SYSTEM_LAST, conversation("1?", "one", "2?", "<think>b</think>two", system="short")),
    ],
)
def test_what_the_template_rewrites_later_is_context_and_counted(tokenizers, source, messages):
    tokenizer = tokenizers["chat"]
    block = RowTokenizer(tokenizer, PromptAnswer(), 1000, chat_template=source)([{"messages": messages}], 0)
    (text,) = said(tokenizer, next(iter(block.rows())))
    assert text.strip() == "<think>b</think>two<|im_end|>"
    assert block.unlearned_messages == 1


def test_a_template_that_answers_otherwise_than_it_asks_is_refused(tokenizers):
    source = THINKING.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
    with pytest.raises(
        DataError, match=r"^row 0: nothing in this conversation can be trained on: .* generation prompt"
    ):
        tokenize(tokenizers["chat"], source, conversation("1?", "one"))


def test_truncation_keeps_the_left_and_a_row_without_answer_is_dropped(tokenizers):
    tokenizer = tokenizers["chat"]
    whole = tokenize(tokenizer, template("chat", False), CONVERSATIONS[1])
    first = int(np.flatnonzero(whole.loss_mask)[0])
    rows = [{"messages": CONVERSATIONS[1]}]
    how = dict(format=PromptAnswer(), chat_template=template("chat", False))
    cut = RowTokenizer(tokenizer, max_seq_len=first + 1, **how)(rows, 0)
    assert (len(cut), cut.truncated, cut.loss_mask.sum()) == (1, 1, 1)
    assert cut.token_ids.tolist() == whole.token_ids[: first + 1].tolist()
    gone = RowTokenizer(tokenizer, max_seq_len=first, **how)(rows, 0)
    assert (len(gone), gone.dropped_untrained) == (0, 1)


def test_an_instruct_tokenizers_own_template_is_taken(tokenizers):
    import copy

    tokenizer = copy.deepcopy(tokenizers["chat"])
    tokenizer.chat_template = template("chat", True)
    assert said(tokenizer, tokenize(tokenizer, None, CONVERSATIONS[0])) == ["the answer is 42<|im_end|>"]
    with pytest.raises(DataError, match=r"^row 0: the tokenizer has no chat template; pass chat_template="):
        tokenize(tokenizers["llama3"], None, CONVERSATIONS[0])


BAD = {
    "null": (None, "column 'messages' is null"),
    "text": ("hello", "column 'messages' is str, not a list of messages"),
    "empty": ([], "column 'messages' is empty"),
    "not a dict": (["hello"], "column 'messages' message 0 is str, not a dict"),
    "no role": ([{"content": "a"}], "message 0 has no role, found 'content'"),
    "no answer": ([{"role": "user", "content": "a"}], "has no assistant message with content"),
    "a blank answer": (conversation("a", " "), "has no assistant message with content"),
    "an image": ([{"role": "user", "content": [{"type": "image"}]}], "message 0 has content of type 'image'"),
    "a lone surrogate": (conversation("a", "\ud800"), "message 1 is not valid Unicode at character 0"),
    "a number": (conversation("a", 3), "message 1 has content of type int, not text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_conversations_are_named(tokenizers, case):
    messages, text = BAD[case]
    with pytest.raises(DataError, match=rf"^row 0: {re.escape(text)}" if "column" in text else re.escape(text)):
        tokenize(tokenizers["chat"], CHATML, messages)


HOSTILE = {
    "for ever": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "did not end within",
    ),
    "repeated": ("{{ 'a' * 10 ** 11 }}", "more than 2 GiB of memory"),
    "doubled": (
        "{% set ns = namespace(x='aaaaaaaa') %}"
        "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "more than 2 GiB of memory|did not end within",
    ),
    "long": ("{{ 'abcdefghij' * 2000000 }}", "renders 20,000,000 characters, more than 10,000,000"),
    "interpreter": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ raise_exception.__globals__['sys'] }}", "SecurityError"),
    "changing": ("{{ messages.append(1) }}", "SecurityError"),
    "no Jinja": ("{% for %}", "TemplateSyntaxError"),
    "refusing": ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_end_in_an_error_that_names_the_row(tokenizers, case, monkeypatch):
    monkeypatch.setattr("kithara_ray.sft.tokens.chat.MAX_SECONDS", 1.0)
    source, text = HOSTILE[case]
    began = time.process_time()
    with pytest.raises(DataError, match=f"^row 0: the chat template .*({text})"):
        tokenize(tokenizers["chat"], source, CONVERSATIONS[0])
    assert time.process_time() - began < 5
    # Nothing of the bounds is left behind.
    rendered = ChatTemplate(tokenizers["chat"], template("chat", True))(CONVERSATIONS[0])
    assert rendered.text.count("<|im_start|>") == 2


def test_a_bad_conversation_is_skipped_and_counted(tokenizers):
    rows = [{"messages": CONVERSATIONS[0]}, {"messages": None}, {"messages": conversation("a", "RAISE")}]
    source = "{% if 'RAISE' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}" + template("chat", False)
    made = RowTokenizer(tokenizers["chat"], PromptAnswer(), 1000, "skip", chat_template=source)
    block = made(rows, 10)
    assert (block.row_ids.tolist(), block.skipped_bad) == ([10], 2)
    assert [sample[:7] for sample in block.samples] == ["row 11:", "row 12:"]


def test_columns_may_have_other_names_and_options_reach_the_template(tokenizers):
    tokenizer = tokenizers["chat"]
    source = template("chat", True) + "{{ '' if thinking is undefined else raise_exception('thinking ' ~ thinking) }}"
    made = RowTokenizer(tokenizer, PromptAnswer({"messages": "chat"}), 1000, chat_template=source)
    assert len(made([{"chat": CONVERSATIONS[0], "prompt": "not looked at"}], 0)) == 1
    with pytest.raises(DataError, match="TemplateError: thinking False"):
        made([{"chat": CONVERSATIONS[0], "chat_template_kwargs": {"thinking": False}}], 0)
    with pytest.raises(DataError, match=r"row 0: no column 'chat', found 'messages'; change column_mapping"):
        made([{"messages": CONVERSATIONS[0]}], 0)


def test_a_formatting_function_may_make_the_conversation(tokenizers):
    for function in (
        lambda row: {"messages": conversation(row["q"], row["a"])},
        lambda batch: {"messages": [conversation(q, a) for q, a in zip(batch["q"], batch["a"], strict=True)]},
    ):
        made = RowTokenizer(tokenizers["chat"], PromptAnswer({}, function), 1000, chat_template=template("chat", False))
        (row,) = made([{"q": "foo", "a": "bar"}], 0).rows()
        assert said(tokenizers["chat"], row) == ["bar<|im_end|>"]


def test_ids_beyond_the_models_vocabulary(tokenizers):
    tokenizer = tokenizers["chat"]
    made = RowTokenizer(tokenizer, PromptAnswer(), 1000, vocabulary=50)
    text = r"^row 5: token '.*' has id \d+, beyond the model's vocabulary of 50, .* give the model's own tokenizer"
    with pytest.raises(DataError, match=text):
        made([{"prompt": "the answer", "answer": "foobar"}], 5)
    assert len(RowTokenizer(tokenizer, PromptAnswer(), 1000, vocabulary=400)([{"prompt": "a", "answer": "b"}], 5)) == 1
