"""A part of the rows is held out of training: exact, without overlap, the same again."""

import logging

import numpy as np
import pytest
import ray

from kithara_ray import Dataloader, SFTDataset, TextCompletionDataset, mix
from kithara_ray.errors import DataError, UnsupportedError
from kithara_ray.orchestration.data.held_out import chosen, tokenize_and_hold_out
from kithara_ray.orchestration.data.pipeline import tokenize
from kithara_ray.orchestration.data.token_rows import Rows

ROWS = [{"prompt": f"what is {i} ?", "answer": f" number {i}"} for i in range(50)]


@pytest.fixture(scope="module")
def directory(tiny_models):
    return str(tiny_models["llama"])


def ids(store):
    rows = Rows(store)
    return [tuple(rows.row(number).token_ids.tolist()) for number in range(store.num_rows)]


@pytest.mark.parametrize(("rows", "fraction", "count"), [(50, 0.1, 5), (50, 0.01, 1), (2, 0.5, 1), (1000, 0.0126, 13)])
def test_so_many_rows_are_chosen(rows, fraction, count):
    held = chosen(rows, fraction, 3)
    assert (len(held), held.sum()) == (rows, count)
    assert (chosen(rows, fraction, 3) == held).all()
    if rows > 2:
        assert (chosen(rows, fraction, 4) != held).any()


def test_none_left_to_train_on():
    for rows in (1, 2):
        with pytest.raises(DataError, match=r"eval_fraction=0.9 holds out \d of \d row.* leaves none to train on"):
            chosen(rows, 0.9, 0)


def test_a_stream_has_no_part_of_its_rows():
    class Stream:
        features = None

        def __iter__(self):
            return iter(ROWS)

    dataset = SFTDataset(Stream(), tokenizer_handle="/nowhere")
    with pytest.raises(UnsupportedError, match="eval_fraction needs a dataset whose rows are known, and this one stre"):
        Dataloader(dataset, 1, eval_fraction=0.1)


def test_rows_are_trained_on_or_held_out(cluster, directory, monkeypatch, caplog):
    monkeypatch.setattr("kithara_ray.orchestration.data.sources._SLICE_ROWS", 12)
    dataset = SFTDataset(ROWS, tokenizer_handle=directory, max_seq_len=64)
    whole = ids(tokenize(dataset))
    assert len(set(whole)) == 50
    with caplog.at_level(logging.WARNING):
        train, held = tokenize_and_hold_out(dataset, 0.2, 5)
    assert "eval_fraction=0.2, seed=5: 10 of 50 rows are held out of training" in caplog.text
    mask = chosen(50, 0.2, 5)
    assert ids(train) == [row for row, out in zip(whole, mask, strict=True) if not out]
    assert ids(held) == [row for row, out in zip(whole, mask, strict=True) if out]
    for store in (train, held):
        blocks = ray.get(list(store.blocks))
        assert store.lengths.tolist() == np.concatenate([block.lengths for block in blocks]).tolist()
        assert store.trained.tolist() == np.concatenate([block.trained() for block in blocks]).tolist()
    assert Rows(held).source_row(3) == np.flatnonzero(mask)[3]
    assert train.content != held.content
    again = tokenize_and_hold_out(dataset, 0.2, 5)
    assert [store.content for store in again] == [train.content, held.content]


def test_of_a_mixture_each_dataset_has_its_share(cluster, directory):
    first = SFTDataset(ROWS[:40], tokenizer_handle=directory)
    second = TextCompletionDataset([{"text": f"the sum of {i}"} for i in range(10)], tokenizer_handle=directory)
    train, held = tokenize_and_hold_out(mix([(first, 3), (second, 1)]), 0.2, 0)
    assert [part.draws for part in train.parts] == [32, 11]
    assert (train.num_rows, held.num_rows) == (32 + 8, 8 + 2)


def test_a_preview_says_the_format_and_what_has_no_effect(cluster, directory):
    rows = [{"instruction": "what is 1 ?", "output": "one", "weight": 2}] * 3
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    shown = SFTDataset(rows, tokenizer_handle=directory, chat_template=template).preview(1)
    for text in ("alpaca (3)", "column 'weight' has no effect: every row counts the same (3 rows)"):
        assert text in str(shown)
