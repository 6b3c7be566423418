"""Offers of slices by time and price, on figures; tests/cli/test_best.py has a whole command."""

from types import SimpleNamespace

import numpy as np
import pytest

from kithara_ray.cli.best import prices_of, ways_of
from kithara_ray.errors import ConfigError
from kithara_ray.plan.best import Offer, Rows, all_slices, front, offer_of
from kithara_ray.plan.chips import CHIPS


def offer(hours: float, cost: float) -> Offer:
    return Offer(SimpleNamespace(), Rows(4096, True, 0.97), 1, hours, cost)


def pairs(offers):
    return [(one.hours, one.cost) for one in offers]


def test_an_offer_that_another_beats_in_both_is_left_out():
    offered = [offer(4, 10), offer(2, 11), offer(3, 12), offer(1, 30), offer(4, 11)]
    assert pairs(front(offered)) == [(4, 10), (2, 11), (1, 30)]
    assert pairs(front(offered, hours=3)) == [(2, 11), (1, 30)]
    assert pairs(front(offered, cost=11)) == [(4, 10), (2, 11)]
    assert front(offered, hours=0.5) == []


def test_time_and_price_are_those_of_useful_tokens():
    """16 rows of 1,000 positions, three quarters of them tokens, in 2 s: 90,000 tokens take 8 steps."""
    plan = SimpleNamespace(slice="v5e-16", chips=16, step_time_s_bound=2.0, tokens_per_step=16_000)
    rows = Rows(1000, False, 0.75)
    assert offer_of(plan, rows, 90_000, None) == Offer(plan, rows, 8, 16 / 3600, 16 * 16 / 3600)
    assert offer_of(plan, rows, 96_000, {"v5e": 1.5}).steps == 8
    assert offer_of(plan, rows, 96_001, {"v5e": 1.5}).steps == 9
    assert offer_of(plan, rows, 90_000, {"v5e": 1.5}).cost == pytest.approx(1.5 * 16 * 16 / 3600)


def test_samples_are_packed_or_padded():
    """Three of 300 tokens in 1,024; 300 are padded to 384, and with longer ones to two lengths."""
    packed, padded = ways_of(np.full(3000, 300), 1024)
    assert (packed.seq_len, packed.packed, packed.useful) == (1024, True, pytest.approx(900 / 1024, rel=1e-3))
    assert padded == Rows(384, False, 300 / 384)
    mixed = ways_of(np.asarray([100] * 3000 + [1000] * 1000), 1000)
    assert mixed[0].seq_len == 1000
    assert mixed[1] == Rows(1024, False, 1_300_000 / (3000 * 128 + 1000 * 1024))


def test_prices():
    assert prices_of(None) is None
    assert prices_of("1.5") == dict.fromkeys(CHIPS, 1.5)
    assert prices_of("v5e=1.2, v6e=2.7") == {"v5e": 1.2, "v6e": 2.7}
    with pytest.raises(ConfigError, match=r"expected a number, or prices such as v5e=1\.2"):
        prices_of("cheap")
    with pytest.raises(ConfigError, match=r"there are v5e, .*, not v9z"):
        prices_of("v9z=1")


def test_the_slices_that_are_considered():
    names = [where.name for where in all_slices(16)]
    assert names[:4] == ["v5e-1", "v6e-1", "v4-8", "v5e-4"]
    assert {"v5e-16", "v5p-32", "v6e-16"} < set(names)
    assert all(where.chips <= 16 for where in all_slices(16))
