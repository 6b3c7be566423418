"""Prompts as ids: texts as the tokenizer encodes them, chats as transformers' own template call does."""

import numpy as np
import pytest
import tiny

from kithara_ray.errors import ConfigError, DataError
from kithara_ray.sft.tokens.prompts import prompt_ids

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
