import io

import numpy as np
import pytest
from rich.console import Console

from kithara_ray.sft.preview import preview
from kithara_ray.sft.tokens.formats import PromptAnswer
from kithara_ray.sft.tokens.tokenize import RowTokenizer

ROWS = [{"prompt": f"what is {i} + 7? ", "answer": "foobar " * (1 + i % 9) + str(i)} for i in range(100)]
COUNTS = {"dropped_untrained": 0, "skipped_bad": 2, "truncated": 5, "unlearned_messages": 1}


@pytest.fixture
def shown(tokenizer):
    block = RowTokenizer(tokenizer, PromptAnswer(), 256)(ROWS, 0)
    rows = list(block.rows())[:3]
    return preview(rows, tokenizer, block.lengths, block.trained(), 256, COUNTS), block


def test_what_is_learned_is_marked(shown, tokenizer):
    made, _ = shown
    assert len(made.rows) == 3
    for row, source in zip(made.rows, ROWS, strict=False):
        learned = "".join(text for text, is_learned in row if is_learned)
        rest = "".join(text for text, is_learned in row if not is_learned)
        assert learned.strip() == source["answer"] + tokenizer.eos_token
        assert rest.endswith(source["prompt"]) or rest.endswith(source["prompt"].rstrip())
    assert f"«{made.rows[0][-1][0]}»" in str(made)


def test_figures(shown):
    made, block = shown
    assert made.tokens_per_epoch == block.lengths.sum()
    assert made.trained_per_epoch == block.loss_mask.sum()
    assert made.truncated_share == 0.05
    assert sum(count for *_, count in made.histogram()) == 100
    edges = made.histogram()
    assert all(count == ((block.lengths >= a) & (block.lengths < b)).sum() for a, b, count in edges[:-1])
    packs = round(block.lengths.sum() / made.packing_efficiency / 256)
    assert 0 <= packs - np.ceil(block.lengths.sum() / 256) <= 1
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(made.render())
    text = console.export_text()
    for part in ("row 2", "tokens an epoch", "5 (5.0%) at max_seq_len 256", "2 bad rows", "1 messages"):
        assert part in text
        assert part in str(made)


def test_a_character_split_over_the_border(tokenizers):
    from kithara_ray.sft.batches.blocks import TokenizedRow

    tokenizer = tokenizers["chat"]
    ids = np.array(tokenizer("aü")["input_ids"], np.int32)
    assert len(ids) == 3
    row = TokenizedRow(ids, np.array([0, 0, 1], np.uint8))
    made = preview([row], tokenizer, np.array([3]), np.array([1]), 8, COUNTS)
    assert [learned for _, learned in made.rows[0]] == [False, True]
    assert made.rows[0][1][0] == "ü"
