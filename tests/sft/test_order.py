import numpy as np
import pytest

from kithara_ray.errors import ConfigError
from kithara_ray.sft.order import PADDING_ROW, BatchOrder


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (7, 3), (8, 4), (3, 8), (100, 7)])
def test_every_row_is_in_exactly_one_batch_of_an_epoch(rows, batch):
    order = BatchOrder(rows, batch, seed=3)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = np.concatenate([order.batch(step) for step in steps])
        assert sorted(seen[seen != PADDING_ROW]) == list(range(rows))
        assert len(seen) == order.steps_per_epoch * batch


def test_padding_is_at_the_end_of_the_epoch_only():
    order = BatchOrder(7, 3)
    assert [(order.batch(step) == PADDING_ROW).sum() for step in range(6)] == [0, 0, 2, 0, 0, 2]


def test_epochs_reshuffle_and_the_seed_decides():
    order = BatchOrder(50, 10, seed=1)
    assert (order.epoch_rows(0) != order.epoch_rows(1)).any()
    assert (order.epoch_rows(0) != BatchOrder(50, 10, seed=2).epoch_rows(0)).any()
    assert (order.epoch_rows(1) == BatchOrder(50, 10, seed=1).epoch_rows(1)).all()


def test_a_batch_does_not_depend_on_what_was_asked_before():
    walked = BatchOrder(23, 4, seed=5)
    sequence = [walked.batch(step) for step in range(15)]
    for step in (14, 0, 7, 13, 6):
        assert (BatchOrder(23, 4, seed=5).batch(step) == sequence[step]).all()
        assert (walked.batch(step) == sequence[step]).all()


def test_the_order_is_fixed_for_all_time():
    """A change of generator would silently change what a resumed run trains on."""
    assert BatchOrder(8, 8, seed=0).batch(0).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]


def test_no_rows_is_an_error():
    with pytest.raises(ConfigError, match="num_rows and batch_rows must be >= 1, got 0 and 4"):
        BatchOrder(0, 4)
