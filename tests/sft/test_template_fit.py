"""Nothing of a conversation vanishes in a chat template: fields, parts, arguments and roles, by what templates do."""

import re

import pytest

from kithara_ray.errors import DataError
from kithara_ray.sft.tokens.chat import ChatTemplate
from kithara_ray.sft.tokens.formats import PromptAnswer
from kithara_ray.sft.tokens.tokenize import RowTokenizer

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ m['content'] }}<|im_end|>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}",
)
CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} ARGUMENTS</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AS_JSON = CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")  # as Qwen2.5, which wants objects
AS_TEXT = CALLS.replace("ARGUMENTS", "{{ c.function.arguments }}")  # as DeepSeek, which wants JSON text
EITHER = CALLS.replace(
    "ARGUMENTS",
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}"
    "{% endif %}",
)
NAMELESS = CALLS.replace("ARGUMENTS", "")
PARTS = PLAIN.replace(  # as templates of multimodal models, which take nothing else
    "{{ m['content'] }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)
BOTH = PLAIN.replace(
    "{{ m['content'] }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
)
# As Qwen3: reasoning of the last turn alone.
REASONS = PLAIN.replace(
    "{{ m['content'] }}",
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m['content'] }}",
)
USER = {"role": "user", "content": "sail"}


def assistant(**fields):
    return {"role": "assistant", "content": "the answer", **fields}


def call(arguments):
    function = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def rendered(tokenizers, source, *messages, tools=None, options=None):
    row = PromptAnswer().read({"messages": list(messages), "tools": tools, "chat_template_kwargs": options}, 0)
    return ChatTemplate(tokenizers["chat"], source)(row["messages"], row["tools"], row["options"])


def learned(made):
    return [made.text[a:b] for a, b in made.spans]


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [PLAIN, MARKED])
def test_messages_of_weight_0_are_context(tokenizers, source):
    turns = [USER, assistant(content="bad", weight=0), USER, assistant(content="good", weight=1), USER, assistant()]
    made = rendered(tokenizers, source, *turns)
    assert learned(made) == ["good<|im_end|>", "the answer<|im_end|>"]
    unweighted = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
    every = rendered(tokenizers, source, *unweighted)
    assert made.text == every.text
    assert learned(every) == ["bad<|im_end|>", "good<|im_end|>", "the answer<|im_end|>"]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (assistant(weight=0.5), "message 1 has weight 0.5; only 0 (context) and 1 (trained on) are accepted"),
        (assistant(weight="0"), "message 1 has weight '0'; only 0"),
        (assistant(weight=0), "has only assistant messages of weight 0, so there is nothing to train on"),
        ({"role": "user", "content": "x", "weight": 1}, "message 1 has weight 1 and role 'user'"),
    ],
)
def test_other_weights_are_refused(tokenizers, message, text):
    messages = [USER, message] + ([] if message["role"] == "assistant" else [assistant()])
    with pytest.raises(DataError, match=rf"^row 0: column 'messages' {re.escape(text)}"):
        rendered(tokenizers, PLAIN, *messages)


def test_a_weight_that_marks_cannot_place_is_refused(tokenizers):
    source = MARKED.replace("{{ m['content'] }}<|im_end|>{% endgen", "{{ loop.revindex }}{{ m['content'] }}{% endgen")
    with pytest.raises(DataError, match="message 1 has weight 0, but the chat template later shows it in another form"):
        rendered(tokenizers, source, USER, assistant(weight=0), USER, assistant())


# --- fields ----------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "add"}}, {"type": "function", "function": {"name": "sub"}}]
DROPPED = {
    "a call alone": (PLAIN, [USER, call({"a": 1})], None, "message 1: the chat template does not show 'tool_calls'"),
    "a call beside text": (PLAIN, [USER, assistant(tool_calls=call({})["tool_calls"])], None, "show 'tool_calls'"),
    "arguments of a call": (NAMELESS, [USER, call({"a": 1})], None, "show 'tool_calls'"),
    "an old call": (PLAIN, [USER, assistant(function_call={"name": "f", "arguments": "{}"})], None, "'tool_calls'"),
    "tools": (PLAIN, [USER, assistant()], TOOLS, "the chat template does not show the tools"),
    "all tools but one": (
        PLAIN.replace("{% for m", "{{ tools[0].function.name if tools }}{% for m", 1), [USER, assistant()], TOOLS,
        "the chat template does not show the tools",
    ),
    "reasoning": (PLAIN, [USER, assistant(reasoning_content="why")], None, "does not show 'reasoning_content'"),
    "reasoning by another name": (PLAIN, [USER, assistant(thinking="why", reasoning="why")], None, "reasoning_content"),
    "a role's content": (
        PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
        [USER, {"role": "tool", "content": "2"}, assistant()], None,
        "message 1: the chat template does not show content of role 'tool'",
    ),
    "a system's message that is not the first": (
        PLAIN.replace("<|im_start|>{{ m", "{% if m.role != 'system' or loop.first %}<|im_start|>{{ m", 1)
        .replace("\n{% endfor %}", "\n{% endif %}{% endfor %}"),
        [USER, {"role": "system", "content": "be short"}, assistant()], None, "content of role 'system'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DROPPED)
def test_what_the_template_leaves_out_is_refused(tokenizers, case):
    source, messages, tools, text = DROPPED[case]
    with pytest.raises(DataError, match=text):
        rendered(tokenizers, source, *messages, tools=tools)


def test_what_is_shown_once_is_looked_for_again_in_the_next_row(tokenizers):
    """A kind of message that was shown is not tried again; one that another row has is."""
    rows = [[USER, assistant()], [USER, call({"a": 1})], [USER, assistant()]]
    made = RowTokenizer(tokenizers["chat"], PromptAnswer(), 256, "skip", chat_template=PLAIN)
    block = made([{"messages": messages} for messages in rows], 0)
    assert (block.row_ids.tolist(), block.skipped_bad) == ([0, 2], 1)
    assert "does not show 'tool_calls'" in block.samples[0]


def test_reasoning_that_the_template_shows_in_the_last_turn_alone_is_taken(tokenizers):
    made = rendered(tokenizers, REASONS, USER, assistant(reasoning_content="a"), USER, assistant(reasoning_content="b"))
    assert learned(made) == ["<think>b</think>the answer<|im_end|>"]
    assert made.unlearned == 1


def test_other_fields_are_said(tokenizers):
    made = rendered(
        tokenizers, AS_JSON, {**USER, "name": "ann"}, call({"a": 1}),
        {"role": "tool", "tool_call_id": "c1", "content": "2"}, assistant(), options={"enable_thinking": False},
    )  # fmt: skip
    assert made.notes == (
        "the chat template does not show 'name' of messages of role 'user'",
        "the chat template reads no variable 'enable_thinking' of chat_template_kwargs",
    )
    reading = AS_JSON + "{{ '' if enable_thinking else '' }}"
    assert rendered(tokenizers, reading, USER, assistant(), options={"enable_thinking": False}).notes == ()


def test_a_block_counts_the_notes_of_its_conversations(tokenizers):
    made = RowTokenizer(tokenizers["chat"], PromptAnswer(), 256, chat_template=PLAIN)
    block = made([{"messages": [{**USER, "name": name}, assistant()]} for name in ("ann", "bob")], 0)
    assert block.notes == {"the chat template does not show 'name' of messages of role 'user'": 2}


def test_an_empty_answer_beside_others_is_said(tokenizers):
    made = rendered(tokenizers, PLAIN, USER, assistant(content=""), USER, assistant())
    assert made.notes == ("a message of the assistant is empty; it is trained on as an empty turn",)
    assert rendered(tokenizers, PLAIN, USER, assistant(content="", weight=0), USER, assistant()).notes == ()


# --- arguments and parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [AS_JSON, AS_TEXT, EITHER])
@pytest.mark.parametrize("arguments", [{"to": "é"}, '{"to": "é"}'])
def test_arguments_are_learned_as_arguments(tokenizers, source, arguments):
    made = rendered(tokenizers, source, USER, call(arguments))
    assert learned(made) == ['<call>add {"to": "é"}</call><|im_end|>']


@pytest.mark.parametrize(("arguments", "text"), [("{a", "are not JSON: "), ("[1]", "are JSON of list, not an object")])
def test_arguments_that_are_no_object(tokenizers, arguments, text):
    with pytest.raises(DataError, match=f"message 1: arguments of a tool call {text}"):
        rendered(tokenizers, AS_JSON, USER, call(arguments))


@pytest.mark.parametrize(
    ("source", "joined"), [(PLAIN, "the\nanswer"), (MARKED, "the\nanswer"), (PARTS, "theanswer"), (BOTH, "theanswer")]
)
def test_parts_are_text_as_the_template_takes_them(tokenizers, source, joined):
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "answer"}]
    made = rendered(tokenizers, source, {"role": "user", "content": parts}, assistant(content=parts))
    assert made.text.startswith(f"<|im_start|>user\n{joined}<|im_end|>")
    assert learned(made) == [f"{joined}<|im_end|>"]


def test_text_is_a_part_where_the_template_takes_nothing_else(tokenizers):
    assert learned(rendered(tokenizers, PARTS, USER, assistant())) == ["the answer<|im_end|>"]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "has content of type 'image_url'; only text"),
        ({"type": "input_audio"}, "has content of type 'input_audio'; only text is trained on"),
        ({"type": "text", "text": None}, "has a text part whose 'text' is NoneType"),
        ({"type": "text", "text": "a", "cache_control": {"a": 1}}, "has a text part with 'cache_control'"),
    ],
)
def test_other_parts_are_refused(tokenizers, part, text):
    with pytest.raises(DataError, match=f"^row 0: column 'messages' message 0 {text}"):
        rendered(tokenizers, PARTS, {"role": "user", "content": [part]}, assistant())


# --- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "meant"), [("asistant", "assistant"), ("Assistant", "assistant"), ("model", "assistant"),
                        ("usr", "user"), ("human", "user"), ("sytem", "system"), ("tools", "tool")],
)  # fmt: skip
def test_a_role_that_is_spelled_near_another_is_refused(tokenizers, role, meant):
    with pytest.raises(DataError, match=f"message 1 has role '{role}'; did you mean '{meant}'?"):
        rendered(tokenizers, PLAIN, USER, {"role": role, "content": "x"}, assistant())


def test_the_template_decides_about_other_roles(tokenizers):
    human = {"role": "human", "content": "x"}
    alike = PLAIN.replace("{{ m['role'] }}", "{{ 'assistant' if m.role == 'assistant' else 'user' }}")
    assert rendered(tokenizers, alike, human, assistant()).notes == ()
    named = PLAIN.replace("{% for", "{% set known = ['human'] %}{% for", 1)
    assert rendered(tokenizers, named, human, assistant()).notes == ()
    told = rendered(tokenizers, PLAIN, USER, {"role": "narrator", "content": "x"}, assistant()).notes
    assert told == ("the chat template does not name role 'narrator'; its messages are context",)


def test_a_conversation_of_nothing_but_a_misspelt_assistant(tokenizers):
    with pytest.raises(DataError, match="nothing to train on; role 'asistant' must be spelled 'assis"):
        rendered(tokenizers, PLAIN, USER, {"role": "asistant", "content": "x"})


def test_old_function_calls_are_tool_calls(tokenizers):
    old = assistant(content=None, function_call={"name": "add", "arguments": '{"a": 1}'})
    made = rendered(tokenizers, AS_JSON, USER, old, {"role": "function", "name": "add", "content": "2"}, assistant())
    assert learned(made) == ['<call>add {"a": 1}</call><|im_end|>', "the answer<|im_end|>"]
    assert "<|im_start|>tool\n2<|im_end|>" in made.text
