"""Prompts as ids: texts as the tokenizer encodes them, chats as transformers' own template call does."""

import copy

import numpy as np
import pytest
import tiny
from tokenizers import processors

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.tokens.formats import PromptAnswer
from kithara_ray.sft.tokens.prompts import Prompting, prompt_ids, stop_ids
from kithara_ray.sft.tokens.tokenize import RowTokenizer

CHAT = [{"role": "system", "content": "be short"}, {"role": "user", "content": "what is 1 + 2 ?"}]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.tokenizer()
    made.chat_template = TEMPLATE
    return made


def test_chats_are_what_transformers_renders(tokenizer):
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert prompt_ids(CHAT, tokenizer) == [expected]
    other = [{"role": "user", "content": "seven"}]
    assert prompt_ids([CHAT, other], tokenizer)[0] == expected
    assert prompt_ids([CHAT, other], tokenizer)[1][-3:] == expected[-3:]


def test_texts_and_ids(tokenizer):
    ids = tokenizer("seven and two")["input_ids"]
    for inputs in ("seven and two", ids, np.array(ids), ["seven and two"], [ids], [np.array(ids)]):
        assert prompt_ids(inputs, tokenizer) == [ids]
    assert prompt_ids(["seven and two", ids, CHAT[1:]], tokenizer)[:2] == [ids, ids]


WRONG = {
    "a number": (3, ConfigError, "inputs must be a text, token ids, a chat as a list of .*got int"),
    "nothing": ([], ConfigError, "inputs must be a text"),
    "a null": (["x", None], ConfigError, "prompt 1 is NoneType"),
    "an empty text": (["x", ""], DataError, "prompt 1 is empty"),
    "a message without content": ([{"role": "user"}], DataError, "prompt 0: the tokenizer's chat template"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case, tokenizer):
    inputs, error, text = WRONG[case]
    if case == "a message without content":
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = "{{ messages[0].content + '' }}"
    with pytest.raises(error, match=text):
        prompt_ids(inputs, tokenizer)


def test_a_tokenizer_without_a_template():
    with pytest.raises(DataError, match="prompt 0 is a chat, and the tokenizer has no chat template"):
        prompt_ids(CHAT, tiny.tokenizer())


def _ends_with_eos(tokenizer):
    """The same tokenizer, of which `tokenizer(text)` puts EOS behind a text: a prompt must not have it."""
    made = copy.deepcopy(tokenizer)
    eos = made.eos_token
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, made.eos_token_id)]
    )
    assert made("a")["input_ids"][-1] == made.eos_token_id
    return made


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("eos_behind", [False, True])
def test_a_prompt_is_what_a_row_of_training_begins_with(tokenizers, kind, eos_behind):
    tokenizer = _ends_with_eos(tokenizers[kind]) if eos_behind else tokenizers[kind]
    prompts = ["the question: ", f"{tokenizer.bos_token}the answer is "]
    rows = RowTokenizer(tokenizer, PromptAnswer(), 100)([{"prompt": p, "answer": "foobar"} for p in prompts], 0).rows()
    for prompt, row in zip(prompts, rows, strict=True):
        context = row.token_ids[row.loss_mask == 0].tolist()
        assert prompt_ids(prompt, tokenizer) == [context]
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer", "name": None}]
    made = RowTokenizer(tokenizer, PromptAnswer(), 100, chat_template=CHATML)
    (row,) = made([{"messages": messages}], 0).rows()
    context = row.token_ids[row.loss_mask == 0].tolist()
    assert prompt_ids(messages[:1], tokenizer, CHATML) == [context]


PARTS = [{"role": "user", "content": [{"type": "text", "text": "question"}]}]


def test_messages_are_fitted_to_the_template_as_rows_are(tokenizers):
    """Content in parts under a template that takes text: a row has the text, and so has the prompt."""
    tokenizer = tokenizers["chat"]
    made = RowTokenizer(tokenizer, PromptAnswer(), 100, chat_template=CHATML)
    (row,) = made([{"messages": [*PARTS, {"role": "assistant", "content": "answer"}]}], 0).rows()
    (ids,) = prompt_ids([PARTS], tokenizer, CHATML)
    assert ids == row.token_ids[row.loss_mask == 0].tolist()
    assert "<user>question" in tokenizer.decode(ids)
    with pytest.raises(DataError, match=r"prompt 0: .*message 0 has no role"):
        prompt_ids([{"content": "question"}], tokenizer, CHATML)


BEYOND = {
    "an id": ([5, 4000, 7], "prompt 0: id 4000 is beyond the model's vocabulary of 300"),
    "a negative id": ([[5], [5, -3]], "prompt 1: -3 is not a token id; ids are 0 to 299"),
    "a token": ("seven <new>", "prompt 0: token '<new>' has id 3[0-9]+, beyond the model's vocabulary of 300"),
    "an array": (np.array([300]), "beyond the model's vocabulary of 300"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_ids_that_no_row_of_the_embedding_stands_for(case):
    inputs, text = BEYOND[case]
    made = tiny.tokenizer()
    made.add_tokens([f"<more{i}>" for i in range(30)] + ["<new>"])
    with pytest.raises(DataError, match=text):
        prompt_ids(inputs, made, vocabulary=300)
    assert prompt_ids([299], made, vocabulary=300) == [[299]]


def test_where_decoding_stops():
    assert stop_ids("auto", {7, 2, 900}, 300) == (2, 7)
    assert stop_ids(np.array([4]), {7}, 300) == (4,)
    for given, text in (
        ([300], "stop_token_ids has 300, and the model's ids are 0 to 299"),
        ([-1], "stop_token_ids has -1"),
        (["</s>"], "must be ids, got '</s>'"),
        ("all", 'must be "auto" or a list of ids'),
    ):
        with pytest.raises(ConfigError, match=text):
            stop_ids(given, {7}, 300)


def test_a_tokenizer_that_is_given_instead(tokenizer):
    mine = Prompting("/mine", "{{ x }}", (5,))
    assert mine.given(None, None) is mine
    assert mine.given(None, "hf://a/b") == Prompting("hf://a/b", None, (5,))
    with pytest.raises(ConfigError, match="one of tokenizer and tokenizer_handle"):
        mine.given(tokenizer, "x")
