"""The batch sequence is a function of the rows and the seed: every row once an epoch, whoever asks and whenever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kithara_ray.errors import ConfigError
from kithara_ray.sft.order import BatchOrder, PackedOrder


@st.composite
def orders(draw):
    """An order over a dataset of random size, and the function that makes it anew."""
    num_rows = draw(st.integers(1, 60))
    batch_rows = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    how = {"batch_rows": batch_rows, "seed": draw(st.integers(0, 2**32)), "shuffle": draw(st.booleans())}
    if not draw(st.booleans()):
        return lambda: BatchOrder(num_rows, **how)
    sizes = draw(st.lists(st.tuples(st.integers(2, 32), st.integers(1, 32)), min_size=num_rows, max_size=num_rows))
    lengths = np.array([size[0] for size in sizes])
    trained = np.minimum(lengths - 1, [size[1] for size in sizes])
    return lambda: PackedOrder(lengths, trained, 32, int(max(trained.max(), 12)), **how)


@settings(max_examples=200, deadline=None)
@given(make=orders(), hosts=st.sampled_from([1, 2, 4, 8]), restart=st.integers(0, 200))
def test_every_row_once_an_epoch_for_any_number_of_hosts_and_after_any_restart(make, hosts, restart):
    order = make()
    first, total = order.steps_of(0), order.total_steps(2)
    sequence = [order.batch(step) for step in range(total)]
    for epoch, steps in enumerate((sequence[:first], sequence[first:])):
        assert sorted(np.concatenate([np.concatenate(packs) for packs in steps])) == list(range(order.num_rows))
        assert order.locate(first * epoch) == (epoch, 0)
    # A host takes its part of each batch; together they have the batch, from an order of their own each.
    if order.batch_rows % hosts == 0:
        part = order.batch_rows // hosts
        whole = [pack for host in range(hosts) for pack in make().batch(total - 1)[host * part : (host + 1) * part]]
        assert [pack.tolist() for pack in whole] == [pack.tolist() for pack in sequence[-1]]
    # A fresh order asked for one step alone gives what a walk from the start gives.
    step = restart % total
    assert [pack.tolist() for pack in make().batch(step)] == [pack.tolist() for pack in sequence[step]]


def test_empty_rows_are_at_the_end_of_the_epoch_only():
    order = BatchOrder(7, 3)
    assert [sum(len(pack) == 0 for pack in order.batch(step)) for step in range(6)] == [0, 0, 2, 0, 0, 2]


def test_epochs_reshuffle_and_the_seed_decides():
    order = BatchOrder(50, 10, seed=1)
    assert (order.epoch_rows(0) != order.epoch_rows(1)).any()
    assert (order.epoch_rows(0) != BatchOrder(50, 10, seed=2).epoch_rows(0)).any()
    assert (order.epoch_rows(1) == BatchOrder(50, 10, seed=1).epoch_rows(1)).all()


def test_the_order_is_fixed_for_all_time():
    """A change of generator would silently change what a resumed run trains on."""
    assert np.concatenate(BatchOrder(8, 8, seed=0).batch(0)).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]


def test_no_rows_is_an_error():
    with pytest.raises(ConfigError, match="num_rows and batch_rows must be >= 1, got 0 and 4"):
        BatchOrder(0, 4)
