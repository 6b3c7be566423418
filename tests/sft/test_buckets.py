import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kithara_ray.sft.batches.buckets import bucket_lengths


def padded(lengths, bounds):
    return sum(min(b for b in bounds if b >= length) for length in lengths)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), most=st.integers(1, 4))
def test_they_pad_least_of_all_that_there_are(lengths, most):
    bounds = bucket_lengths(np.array(lengths), most, 8, 0)
    assert len(bounds) <= most
    assert list(bounds) == sorted(set(bounds))
    assert all(bound % 8 == 0 for bound in bounds)
    assert bounds[-1] == -(-max(lengths) // 8) * 8
    candidates = range(8, bounds[-1], 8)
    best = min(
        padded(lengths, [*some, bounds[-1]])
        for some in itertools.combinations(candidates, min(len(bounds) - 1, len(candidates)))
    )
    assert padded(lengths, bounds) == best


def test_a_length_that_saves_little_is_not_taken():
    assert bucket_lengths(np.array([40] * 100 + [48] * 100), 4, 8, 0) == (48,)
    assert bucket_lengths(np.array([40] * 100 + [480]), 4, 8, 0) == (40, 480)


def test_a_length_that_saves_less_than_compiling_costs_is_not_taken():
    assert bucket_lengths(np.array([40] * 37 + [480]), 4, 8) == (480,)
    assert bucket_lengths(np.array([40] * 38 + [480]), 4, 8) == (40, 480)
