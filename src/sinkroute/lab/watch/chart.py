"""Curves of thousands of lines as few points of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Chart", "chart"]

WIDTH, HEIGHT = 760, 210
LEFT, RIGHT, TOP, BOTTOM = 56, 56, 12, 40
BUCKETS = 240  # along a curve


@dataclass(frozen=True)
class Chart:
    """A picture of curves, in the units of its SVG.

    Attributes:
        title: what is drawn upwards.
        curves: of each run the number of its colour, its name, the points of its line, and of the band between the
            smallest and the largest value that a point of the line stands for (empty where it stands for one).
        across, upwards: ticks, each a place and its words.
        lines: of a log for a point, at most.
    """

    title: str
    curves: list[tuple[int, str, str, str]]
    across: list[tuple[float, str]]
    upwards: list[tuple[float, str]]
    lines: int


def chart(title: str, values: Mapping[tuple[int, str], Sequence[tuple[int, float]]]) -> Chart | None:
    """A chart of (step, value) pairs by (number of the colour, name of the run); None without a finite value."""
    finite = {run: [(x, y) for x, y in pairs if math.isfinite(y)] for run, pairs in values.items()}
    everything = [pair for pairs in finite.values() for pair in pairs]
    if not everything:
        return None
    steps, heights = [x for x, _ in everything], [y for _, y in everything]
    ticks_x, ticks_y = _ticks(min(steps), max(steps)), _ticks(min(heights), max(heights))
    (x0, x1), (y0, y1) = (
        (min(*found, ticks[0]), max(*found, ticks[-1]) if found is heights else max(found))
        for found, ticks in ((steps, ticks_x), (heights, ticks_y))
    )

    def across(step: float) -> float:
        return round(LEFT + (step - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT), 1)

    def up(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - y0) / ((y1 - y0) or 1) * (HEIGHT - TOP - BOTTOM), 1)

    curves, most = [], 1
    for (ink, name), pairs in finite.items():
        several = math.ceil(len(pairs) / BUCKETS)
        most = max(most, several)
        buckets = [pairs[at : at + several] for at in range(0, len(pairs), max(1, several))]
        means, lows, highs = [], [], []
        for bucket in buckets:
            x, inside = across(bucket[-1][0]), [y for _, y in bucket]
            means.append(f"{x},{up(sum(inside) / len(inside))}")
            lows.append(f"{x},{up(min(inside))}")
            highs.append(f"{x},{up(max(inside))}")
        band = " ".join([*lows, *reversed(highs)]) if several > 1 else ""
        curves.append((ink, name, " ".join(means), band))
    return Chart(
        title,
        curves,
        [(across(tick), f"{tick:,.0f}") for tick in ticks_x if x0 <= tick <= x1 and tick == int(tick)],
        [(up(tick), f"{tick:g}") for tick in ticks_y if y0 <= tick <= y1],
        most,
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below the one to above the other.

    >>> _ticks(0.13, 0.92)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    unit *= next(factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 5)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [round(number * unit, 10) for number in range(first, last + 1)]
