"""The batch sequence is a function of the rows and the seed: every row once an epoch, whoever asks and whenever."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kithara_ray.errors import ConfigError
from kithara_ray.sft.batches.order import BatchOrder, PackedOrder, Part


@st.composite
def orders(draw):
    """A function that makes an order anew, over a dataset of random size: packed, in buckets or plain."""
    num_rows = draw(st.integers(1, 60))
    how = {
        "batch_rows": draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        "seed": draw(st.integers(0, 2**32)),
        "shuffle": draw(st.booleans()),
        "shuffle_rows": draw(st.none() | st.integers(1, 80)),
    }
    kind = draw(st.sampled_from(["plain", "buckets", "packed"]))
    if kind == "plain":
        return lambda: BatchOrder(size=num_rows, **how)
    sizes = draw(st.lists(st.tuples(st.integers(2, 32), st.integers(1, 32)), min_size=num_rows, max_size=num_rows))
    lengths = np.array([size[0] for size in sizes])
    if kind == "buckets":
        return lambda: BatchOrder(size=num_rows, lengths=lengths, **how)
    trained = np.minimum(lengths - 1, [size[1] for size in sizes])
    room = {"seq_len": 32, "predictions": int(max(trained.max(), 12))}
    return lambda: PackedOrder(lengths=lengths, trained=trained, **room, **how)


@settings(max_examples=300, deadline=None)
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
    for order in (BatchOrder(size=7, batch_rows=3), BatchOrder(size=7, batch_rows=3, lengths=np.arange(7) + 2)):
        assert [sum(len(pack) == 0 for pack in order.batch(step)) for step in range(6)] == [0, 0, 2, 0, 0, 2]


def test_epochs_reshuffle_and_the_seed_decides():
    order = BatchOrder(size=50, batch_rows=10, seed=1)
    assert (order.epoch_rows(0) != order.epoch_rows(1)).any()
    assert (order.epoch_rows(0) != BatchOrder(size=50, batch_rows=10, seed=2).epoch_rows(0)).any()
    assert (order.epoch_rows(1) == BatchOrder(size=50, batch_rows=10, seed=1).epoch_rows(1)).all()


def test_the_order_is_fixed_for_all_time():
    """A change of generator would silently change what a resumed run trains on."""
    assert np.concatenate(BatchOrder(size=8, batch_rows=8).batch(0)).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]


def test_no_rows_is_an_error():
    with pytest.raises(ConfigError, match="num_rows and batch_rows must be >= 1, got 0 and 4"):
        BatchOrder(size=0, batch_rows=4)


# --- rows of like length ---------------------------------------------------------------------------------------------


def test_rows_of_like_length_share_a_batch_and_batches_come_in_no_order_of_length():
    lengths = np.random.default_rng(0).permutation(np.arange(2, 4002))
    grouped = BatchOrder(size=4000, batch_rows=8, lengths=lengths)
    longest, positions = [], 0
    for step in range(500):
        sizes = lengths[np.concatenate(grouped.batch(step))]
        longest.append(sizes.max())
        positions += 8 * sizes.max()
    assert positions < 1.02 * lengths.sum()
    assert abs(np.corrcoef(np.arange(500), longest)[0, 1]) < 0.1
    # Rows meet others in every epoch.
    assert {frozenset(np.concatenate(grouped.batch(s)).tolist()) for s in range(500)}.isdisjoint(
        frozenset(np.concatenate(grouped.batch(s)).tolist()) for s in range(500, 1000)
    )


def test_without_a_shuffle_the_order_stays():
    order = BatchOrder(size=6, batch_rows=2, lengths=np.array([9, 2, 8, 3, 7, 4]), shuffle=False)
    assert [np.concatenate(order.batch(step)).tolist() for step in range(3)] == [[0, 1], [2, 3], [4, 5]]


# --- data too large for access at random -----------------------------------------------------------------------------


def test_a_windowed_shuffle_touches_few_stretches_at_a_time_and_all_of_the_data_soon():
    order = BatchOrder(size=100_000, batch_rows=100, shuffle_rows=1600)
    rows = order.epoch_rows(0)
    assert sorted(rows) == list(range(100_000))
    for start in range(0, 100_000, 1600):
        assert len(np.unique(rows[start : start + 1600] // 100)) <= 17
    assert np.ptp(rows[:1600]) > 80_000
    assert (np.diff(rows) == 1).mean() < 0.01
    assert (rows != order.epoch_rows(1)).mean() > 0.99


# --- mixtures --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=4),
    shuffle=st.booleans(),
    shuffle_rows=st.none() | st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_a_mixture_draws_each_part_its_share_and_no_row_again_before_all(parts, shuffle, shuffle_rows, seed):
    bounds = np.cumsum([0] + [size for size, _ in parts])
    mixture = tuple(Part(int(bounds[i]), int(bounds[i + 1]), draws) for i, (_, draws) in enumerate(parts))
    how = dict(batch_rows=4, seed=seed, shuffle=shuffle, shuffle_rows=shuffle_rows, parts=mixture)
    order = BatchOrder(size=int(bounds[-1]), **how)
    seen = Counter()
    for epoch in range(3):
        rows = order.epoch_rows(epoch)
        assert len(rows) == order.epoch_size == sum(draws for _, draws in parts)
        seen.update(rows.tolist())
        for part in mixture:
            counts = [seen[row] for row in range(part.start, part.stop)]
            assert sum(counts) == part.draws * (epoch + 1)
            assert max(counts) - min(counts) <= 1
    assert (BatchOrder(size=int(bounds[-1]), **how).epoch_rows(2) == order.epoch_rows(2)).all()


def test_a_mixture_is_even_along_the_epoch():
    order = BatchOrder(size=1100, batch_rows=10, parts=(Part(0, 1000, 900), Part(1000, 1100, 100)))
    share = [np.mean(order.epoch_rows(0)[i : i + 100] >= 1000) for i in range(0, 1000, 100)]
    assert 0.02 <= min(share)
    assert max(share) <= 0.2
