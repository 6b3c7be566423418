"""Where a trained model stops is read off the rows; no Ray is started."""

import numpy as np
import pytest
import tiny

from kithara_ray.orchestration.data.datasets import SFTDataset, TextCompletionDataset, mix
from kithara_ray.orchestration.data.learned_ends import last_tokens
from kithara_ray.orchestration.driver.kept_tokenizer import prompting_of

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("chat_template", "end"), [(None, "<|im_end|>"), (TEMPLATE, "<|endoftext|>")])
def test_the_last_learned_token_of_rows_that_were_not_cut(chat_template, end):
    tokenizer = tiny.tokenizer()
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "seven"}]
    short = {"messages": messages} if chat_template else {"prompt": "what", "answer": "seven"}
    long = {"messages": [messages[0], {"role": "assistant", "content": "three " * 40}]}
    long = long if chat_template else {"prompt": "what", "answer": "three " * 40}
    made = SFTDataset([short], tokenizer, max_seq_len=40, chat_template=chat_template).row_tokenizer()
    block = made([short, long, short], 0)
    assert block.truncated == 1
    assert last_tokens(block, (40,)) == {tokenizer.convert_tokens_to_ids(end)}
    assert len(last_tokens(block, ())) == 2  # what the cut row ends with tells nothing
    block.loss_mask[np.cumsum(block.lengths) - 1] = 0
    assert last_tokens(block, (40,)) == set()


def test_a_mixture_is_prompted_by_the_template_that_one_of_its_parts_has(caplog):
    tokenizer, rows = tiny.tokenizer(), [{"prompt": "a", "answer": "b"}]
    plain = TextCompletionDataset([{"text": "a"}], tokenizer)
    mine, other = (SFTDataset(rows, tokenizer, chat_template=text) for text in (TEMPLATE, TEMPLATE + "{# #}"))
    assert prompting_of(mix([(plain, 1), (mine, 1)])).chat_template == TEMPLATE
    assert prompting_of(plain).chat_template is None
    assert not caplog.records
    assert prompting_of(mix([(mine, 1), (other, 1)])).chat_template == TEMPLATE
    assert "the mixture has 2 chat templates" in caplog.text
