import numpy as np
import pytest

from kithara_ray.sft.collate import collate
from kithara_ray.sft.tokenize import TokenizedRow


def _row(ids, mask):
    return TokenizedRow(np.array(ids, np.int32), np.array(mask, np.uint8))


def test_collate():
    batch = collate([_row([5, 6, 7, 8], [0, 0, 1, 1]), _row([9, 9], [0, 1]), None], seq_len=5, pad_id=9)
    assert batch["token_ids"].tolist() == [[5, 6, 7, 8, 9], [9, 9, 9, 9, 9], [9, 9, 9, 9, 9]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert batch["loss_weights"].tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert {name: array.dtype for name, array in batch.items()} == {
        "token_ids": np.int32,
        "segment_ids": np.int32,
        "loss_weights": np.float32,
    }


def test_weights_stand_where_the_target_is_predicted():
    """Position t is weighed if and only if token t+1 is a target, also in a row that fills the batch."""
    row = _row([3, 4, 5, 6], [0, 1, 0, 1])
    weights = collate([row], seq_len=4, pad_id=0)["loss_weights"][0]
    assert weights.tolist() == [1, 0, 1, 0]
    assert weights.sum() == row.loss_mask.sum()


def test_a_batch_of_padding_rows_is_finite_under_attention():
    segments = collate([None, None], seq_len=3, pad_id=0)["segment_ids"]
    assert (segments > 0).any(axis=1).all()


def test_a_longer_row_is_a_bug():
    with pytest.raises(AssertionError, match="row of 3 tokens in a batch of seq_len 2"):
        collate([_row([1, 2, 3], [0, 1, 1])], seq_len=2, pad_id=0)


def test_no_rows():
    assert collate([], seq_len=4, pad_id=0)["token_ids"].shape == (0, 4)
