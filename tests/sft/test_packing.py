import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kithara_ray.sft.batches.packing import best_fit


def packs(lengths, trained=None, **how):
    lengths = np.array(lengths)
    trained = np.ones(len(lengths), int) if trained is None else np.array(trained)
    rows, starts = best_fit(np.arange(len(lengths)), lengths, trained, **{"seq_len": 10, "predictions": 9} | how)
    return [rows[a:b].tolist() for a, b in itertools.pairwise(starts)]


def test_a_sample_goes_into_the_row_that_it_fills_best():
    # 4 fits behind 6 and behind 5, and fills the first; 3 and 2 then fill the second.
    assert packs([6, 5, 4, 3, 2]) == [[0, 2], [1, 3, 4]]
    # Behind 5 it would come first, but behind 6 it leaves nothing.
    assert packs([5, 6, 4, 5]) == [[1, 2], [0, 3]]


def test_the_fullest_row_is_closed_when_the_window_is_full():
    # 9 is the fullest when 6 needs a row; 3 then fits behind 7.
    assert packs([7, 9, 6, 3], window=2) == [[1], [0, 3], [2]]


def test_room_for_predictions_counts_as_well():
    assert packs([2, 2, 2], predictions=2) == [[0, 1], [2]]
    # The best fit for 2 is behind 7, where one prediction is left; it goes where there is the most room.
    assert packs([7, 5, 2], [4, 1, 2], predictions=5) == [[0], [1, 2]]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), max_size=80),
    window=st.integers(1, 12),
)
def test_every_sample_once_and_no_pack_too_large(sizes, window):
    lengths, trained = (np.array([size[i] for size in sizes], np.int64) for i in (0, 1))
    rows, starts = best_fit(np.arange(len(sizes)), lengths, trained, 20, 8, window)
    assert sorted(rows) == list(range(len(sizes)))
    for a, b in itertools.pairwise(starts):
        assert b > a
        assert lengths[rows[a:b]].sum() <= 20
        assert trained[rows[a:b]].sum() <= 8


@pytest.mark.parametrize("seq_len", [512, 2048])
def test_long_tailed_lengths_fill_more_than_95_percent(seq_len):
    """Log-normal, as chat data is: the median under a tenth of the row."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(seq_len / 12), 0.9, 4000).astype(int), 3, seq_len)
    trained = np.maximum(1, (lengths * rng.uniform(0.2, 0.8, 4000)).astype(int))
    predictions = int(1.15 * trained.sum() / lengths.sum() * seq_len)
    trained = np.minimum(trained, predictions)
    assert np.median(lengths) < seq_len / 10
    _, starts = best_fit(rng.permutation(4000), lengths, trained, seq_len, predictions)
    assert lengths.sum() / ((len(starts) - 1) * seq_len) > 0.95
