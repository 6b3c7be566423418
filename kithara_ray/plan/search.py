"""The largest batch that fits, and a grid of settings."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kithara_ray.plan.chips import Slice, slice_of
from kithara_ray.plan.planner import plan
from kithara_ray.plan.report import Plan

# More rows per step add nothing: the chip is busy long before.
_MAX_ROWS = 64


def largest_batch(base: Any, where: str | Slice, seq_len: int, **settings: Any) -> Plan:
    """Find the plan with the largest power-of-two number of rows per device that fits; one row if none fits.

    The search first assumes that each row adds the temporaries of a one-row plan. It then compiles two or three
    programs instead of seven.
    """
    best = plan(base, where, seq_len, 1, **settings)
    if not best.fits:
        return best
    hbm = best.hbm_bytes_per_chip
    assert hbm["available"] is not None  # a plan fits memory of a known size
    room = hbm["available"] - hbm["total"]
    rows = 2 * _power_of_two(1 + room // max(1, hbm["temporaries"]))
    tried: dict[int, Plan] = {}
    while 1 < rows <= _MAX_ROWS and rows not in tried:
        tried[rows] = plan(base, where, seq_len, rows, **settings)
        if tried[rows].fits:
            best, rows = tried[rows], rows * 2
        elif rows // 2 > best.settings["per_device_batch_size"]:
            rows //= 2
        else:
            break
    return best


def _power_of_two(count: int) -> int:
    """The largest power of two up to `count`, at most half of `_MAX_ROWS`."""
    return min(_MAX_ROWS // 2, 2 ** (max(1, int(count)).bit_length() - 1))


def grid(slices: Sequence[str], seq_lens: Sequence[int], ranks: Sequence[int | None]) -> list[dict[str, Any]]:
    """The points of a sweep, the smallest slice first; a run that trains all weights has the rank None."""
    ordered = sorted(slices, key=lambda name: (slice_of(name).chips, name))
    points = itertools.product(seq_lens, ranks, ordered)
    return [{"slice": name, "seq_len": seq_len, "rank": rank} for seq_len, rank, name in points]


def smallest_that_fits(points: Iterable[Mapping[str, Any]], plans: Iterable[Plan]) -> dict[tuple[int, int | None], str]:
    """Map (seq_len, rank) to the slice of fewest chips on which one row per chip fits."""
    found: dict[tuple[int, int | None], str] = {}
    for point, made in zip(points, plans, strict=True):
        if made.fits:
            found.setdefault((point["seq_len"], point["rank"]), point["slice"])
    return found
