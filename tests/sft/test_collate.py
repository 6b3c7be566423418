import numpy as np
import pytest

from kithara_ray.sft.batches.blocks import TokenizedRow
from kithara_ray.sft.batches.collate import collate


def _row(ids, mask):
    return TokenizedRow(np.array(ids, np.int32), np.array(mask, np.uint8))


def test_collate():
    rows = [[_row([5, 6, 7, 8], [0, 0, 1, 1])], [_row([9, 9], [0, 1])], []]
    batch = collate(rows, seq_len=5, predictions=3, pad_id=9)
    assert batch["token_ids"].tolist() == [[5, 6, 7, 8, 9], [9, 9, 9, 9, 9], [9, 9, 9, 9, 9]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert batch["target_positions"].tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert batch["target_ids"].tolist() == [[7, 8, 0], [9, 0, 0], [0, 0, 0]]
    assert batch["target_weights"].tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    floats = {name for name, array in batch.items() if array.dtype == np.float32}
    assert floats == {"target_weights"}
    assert all(array.dtype == np.int32 for name, array in batch.items() if name not in floats)


def test_a_pack_of_samples():
    """Segments are numbered; nothing is predicted across samples."""
    pack = [_row([5, 6, 7], [0, 1, 1]), _row([8, 9], [0, 1]), _row([4, 3], [0, 1])]
    batch = collate([pack], seq_len=8, predictions=5, pad_id=1)
    assert batch["token_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3, 1]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 3, 3, 0]]
    assert batch["target_positions"].tolist() == [[0, 1, 3, 5, 0]]
    assert batch["target_ids"].tolist() == [[6, 7, 9, 3, 0]]
    assert batch["target_weights"].tolist() == [[1, 1, 1, 1, 0]]


def test_a_trained_token_is_predicted_from_the_position_before_it():
    row = _row([3, 4, 5, 6], [0, 1, 0, 1])
    batch = collate([[row]], seq_len=4, predictions=2, pad_id=0)
    assert batch["target_positions"].tolist() == [[0, 2]]
    assert batch["target_ids"].tolist() == [[4, 6]]


def test_a_batch_of_empty_packs_is_finite_under_attention():
    segments = collate([[], []], seq_len=3, predictions=1, pad_id=0)["segment_ids"]
    assert (segments > 0).any(axis=1).all()


def test_rows_that_do_not_fit_are_a_bug():
    row = _row([1, 2, 3], [0, 1, 1])
    with pytest.raises(AssertionError, match="pack of 3 tokens in a batch of seq_len 2"):
        collate([[row]], seq_len=2, predictions=2, pad_id=0)
    with pytest.raises(AssertionError, match="pack of 2 trained tokens in a batch of 1"):
        collate([[row]], seq_len=3, predictions=1, pad_id=0)


def test_no_rows():
    assert collate([], seq_len=4, predictions=1, pad_id=0)["token_ids"].shape == (0, 4)
