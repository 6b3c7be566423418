"""The slices on which a run's data can be trained: time and price of each, with the fastest settings there.

Every slice is estimated with all meshes, remat policies, rows per device and row lengths, from one built model. The
slices that no other beats in both time and price are then compiled, each with `chooser.choose`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kithara_ray.plan.chips import CHIPS, Slice, slice_of, slice_sizes
from kithara_ray.plan.chooser import fastest
from kithara_ray.plan.estimates import Layout, layouts
from kithara_ray.plan.report import Plan

# The largest slice that is considered by default, in chips.
MOST_CHIPS = 256


@dataclass(frozen=True)
class Rows:
    """One way to lay the data out in rows.

    Attributes:
        seq_len: T, positions of a row.
        packed: several samples share a row.
        useful: share of the positions that hold a token; the rest is padding.
    """

    seq_len: int
    packed: bool
    useful: float


@dataclass(frozen=True)
class Offer:
    """One slice with its fastest settings.

    Attributes:
        plan: the plan of the settings.
        rows: the layout of the data.
        steps: steps that the data takes.
        hours: time of these steps at the plan's bound; a real run takes longer.
        cost: price of these hours; without prices, chip-hours.
    """

    plan: Plan
    rows: Rows
    steps: int
    hours: float
    cost: float


def all_slices(most_chips: int = MOST_CHIPS) -> list[Slice]:
    """The usual slices of every generation, the smallest first."""
    named = [slice_of(f"{chip}-{size}") for chip in CHIPS for size in slice_sizes(chip)]
    return sorted((s for s in named if s.chips <= most_chips), key=lambda s: (s.chips, s.name))


def offers(
    base: Any,
    slices: Sequence[Slice],
    data: Sequence[Rows],
    tokens: int,
    rows: Sequence[int],
    prices: Mapping[str, float] | None,
    settings: Mapping[str, Any],
) -> list[Offer]:
    """Estimate the fastest settings of each slice on which the run may fit.

    Args:
        data: ways to lay the data out.
        tokens: tokens of the data, without padding, of all epochs together.
        rows: numbers of rows per device.
        prices: price of a chip and hour by generation; a generation without one is left out. None counts chip-hours.
        settings: arguments of `plan`, among them `remat` and `mesh`; "auto" and None leave them open.
    """
    wanted = [where for where in slices if prices is None or _generation(where) in prices]
    if not wanted:
        return []
    points = [Layout(where, way.seq_len, number) for where in wanted for way in data for number in rows]
    found: dict[str, Offer] = {}
    for point, plans in zip(points, layouts(base, points, settings), strict=True):
        best = fastest(plans)
        if best is None:
            continue
        for way in data:
            if way.seq_len != point.seq_len:
                continue
            offer = offer_of(best, way, tokens, prices)
            known = found.get(point.where.name)
            if known is None or offer.hours < known.hours:
                found[point.where.name] = offer
    return list(found.values())


def offer_of(plan: Plan, rows: Rows, tokens: int, prices: Mapping[str, float] | None) -> Offer:
    """The time and price of all tokens with this plan."""
    assert plan.step_time_s_bound is not None
    steps = max(1, -(-tokens // int(plan.tokens_per_step * rows.useful)))
    hours = steps * plan.step_time_s_bound / 3600
    price = 1.0 if prices is None else prices[_generation(slice_of(plan.slice))]
    return Offer(plan, rows, steps, hours, hours * plan.chips * price)


def front(offered: Sequence[Offer], hours: float | None = None, cost: float | None = None) -> list[Offer]:
    """The offers within the limits that no other beats in both time and price, the cheapest first."""
    within = [o for o in offered if (hours is None or o.hours <= hours) and (cost is None or o.cost <= cost)]
    best: list[Offer] = []
    for offer in sorted(within, key=lambda o: (o.cost, o.hours)):
        if not best or offer.hours < best[-1].hours:
            best.append(offer)
    return best


def _generation(where: Slice) -> str:
    return where.name.partition("-")[0]
