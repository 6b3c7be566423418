"""Draw lines as SVG that stretches with the page. Ticks are text beside the SVG, so they stay readable on a phone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Above this many points, a chart draws averages, with the range of each average behind the line.
MOST_POINTS = 400
_WIDTH, _HEIGHT = 1000.0, 100.0
_UNITS_S = ((86400, "d"), (3600, "h"), (60, "min"))


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: its name in the legend.
        points: (x, y), x ascending.
        colour: 1 or 2.
        dots: draw a dot on each point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    dots: bool = False


def chart(name: str, title: str, series: Sequence[Series], from_zero: bool = False, note: str = "") -> dict | None:
    """Return the values from which the template draws series over steps; None if no point is finite."""
    series = [Series(s.name, _finite(s.points), s.colour, s.dots) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return None
    drawn = [(s, _averaged(s.points)) for s in series]
    x_low, x_high = _range([x for s in series for x, _ in s.points])
    ticks = nice_ticks(*_range([y for s in series for _, y in s.points] + [0.0] * from_zero))
    y_low, y_high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return _WIDTH * (x - x_low) / (x_high - x_low), _HEIGHT * (1 - (y - y_low) / (y_high - y_low))

    def path(points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x:.1f} {y:.2f}" for x, y in (place(*point) for point in points))

    lines = []
    for s, points in drawn:
        band = ""
        if len(points) < len(s.points):
            band = path([(x, low) for x, _, low, _ in points] + [(x, high) for x, _, _, high in reversed(points)]) + "Z"
        middle = [(x, y) for x, y, _, _ in points]
        # A single point makes no line, so it gets a dot.
        dots = "".join(f"M{x:.1f} {y:.2f}h0" for x, y in (place(*point) for point in middle))
        lines.append(
            {
                "name": s.name,
                "colour": s.colour,
                "path": path(middle),
                "band": band,
                "dots": dots if s.dots or len(middle) == 1 else "",
                "last": short(s.points[-1][1]),
            }
        )
    size = max(math.ceil(len(s.points) / MOST_POINTS) for s in series)
    return {
        "name": name,
        "title": title,
        "note": f"{note} Each point is the mean of {size}, the band their range.".strip() if size > 1 else note,
        "lines": lines,
        "y_ticks": [{"text": short(y), "at": round(place(x_low, y)[1], 2)} for y in ticks],
        "x_ticks": [{"text": short(x), "at": round(place(x, y_low)[0] / 10, 2)} for x in _x_ticks(x_low, x_high)],
        "data": {
            "x": [x_low, x_high],
            "y": [y_low, y_high],
            "series": [{"name": s.name, "points": [[x, y] for x, y, _, _ in points]} for s, points in drawn],
        },
    }


def _finite(points: Sequence[tuple[Any, Any]]) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for x, y in points
        if isinstance(y, (int, float)) and not isinstance(y, bool) and math.isfinite(y)
    ]


def _averaged(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Average points into at most MOST_POINTS of (x, y, lowest, highest)."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (
            group[-1][0],
            sum(y for _, y in group) / len(group),
            min(y for _, y in group),
            max(y for _, y in group),
        )
        for group in groups
    ]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    return (low - abs(low) / 10, high + abs(high) / 10) if low else (-1.0, 1.0)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers in steps of 1, 2 or 5 times a power of ten that enclose [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _x_ticks(low: float, high: float) -> list[float]:
    inner = [x for x in nice_ticks(low, high) if low <= x <= high and x == int(x)]
    return inner or [low]


def short(value: Any) -> str:
    """Format a number for a tick or a tile: 0.0002 as 2e-4, 12345 as 12.3k."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and size < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.4g}"


def size(value: float) -> str:
    """Format bytes for a reader: 38.8 kB, 5.23 GB."""
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB")) if value >= pair[0]), (1e3, "kB"))
    return f"{value / unit:.3g} {name}"


def seconds(value: float) -> str:
    """Format a time in seconds for a reader: 0.42 s, 12 s, 3.5 min, 2.1 h."""
    for size, unit in _UNITS_S:
        if value >= size * (2 if unit == "d" else 1):
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"
