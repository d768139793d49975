"""Loads of experts as SVG that belongs to the page it stands in: layers × experts, and bars of one layer.

Colours are those of `loads`; dead experts are crossed out; every cell says its number where one points at it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from sinkroute.lab.page.loads import LEAST_TOP, colour, ticks
from sinkroute.routing.metrics import DEAD

__all__ = ["bars_svg", "heat_svg"]

_WIDTH, _ROW, _LETTER, _LONGEST = 1000.0, 17.0, 7.4, 28
_MOST = 256  # cells in a row


def heat_svg(rows: Sequence[tuple[str, Sequence[float]]], title: str) -> str:
    """A row for every layer, a column for every expert; beyond 256 for several, of which the busiest is shown.

    Args:
        rows: the name of each layer, and its loads over a fair share.
        title: for those who cannot see it.
    """
    most = max((len(loads) for _, loads in rows), default=0)
    if not most:
        return ""
    several = math.ceil(most / _MOST)
    top = max(LEAST_TOP, *(max(loads) for _, loads in rows if loads))
    left = 34 + _LETTER * max(5, *(len(_short(label)) for label, _ in rows))
    step, height = (_WIDTH - left) * several / most, _ROW * len(rows)
    out = [
        f'<svg class="plot heat" viewBox="0 0 {_WIDTH:g} {height + 84:g}" role="img" aria-label="{escape(title)}">',
        f'<text transform="translate(12 {height / 2:g}) rotate(-90)" text-anchor="middle">layer</text>',
    ]
    for row, (label, loads) in enumerate(rows):
        y = row * _ROW
        out.append(f'<text x="{left - 8:g}" y="{y + 13:g}" text-anchor="end">{escape(_short(label))}</text>')
        for first in range(0, len(loads), several):
            part = loads[first : first + several]
            load, dead = max(part), min(part) < DEAD
            x, (ink, opacity) = left + first / several * step, colour(load, top)
            told = f"layer {label}, expert {first + part.index(load)}: {load:.2f} of a fair share"
            told += "" if not dead else ", dead" if several == 1 else f"; a dead one among {len(part)}"
            out.append(
                f'<g class="cell{" dead" if dead else ""}"><title>{escape(told)}</title>'
                f'<rect x="{x:.2f}" y="{y:g}" width="{step:.2f}" height="{_ROW - 1:g}" fill="{ink}" '
                f'fill-opacity="{opacity:.2f}"/>{_cross(x, y, step) if dead else ""}</g>'
            )
    every = next(size for size in (2**power for power in range(20)) if size * step / several >= 28 or size > most)
    for expert in range(0, most, every):
        x = left + (expert / several + 0.5) * step
        out.append(f'<text x="{x:.2f}" y="{height + 14:g}" text-anchor="middle">{expert}</text>')
    out.append(f'<text x="{(left + _WIDTH) / 2:.2f}" y="{height + 31:g}" text-anchor="middle">expert</text>')
    return "".join([*out, _scale(left, height + 44, top), "</svg>"])


def bars_svg(loads: Sequence[float]) -> str:
    """Loads over a fair share from the largest to the smallest; the line is a fair share."""
    if not loads:
        return ""
    top, step = max(3.0, *loads), 120 / len(loads)
    width = max(step - (step > 3), 0.4)
    points = "".join(
        f"M{place * step:.1f} 24h{width:.1f}v{-24 * load / top:.2f}h{-width:.1f}z"
        for place, load in enumerate(sorted(loads, reverse=True))
    )
    return (
        f'<svg class="bars" viewBox="0 0 120 24" aria-hidden="true"><path d="{points}"/>'
        f'<path class="fair" d="M0 {24 - 24 / top:.2f}H120"/></svg>'
    )


def _scale(x: float, y: float, top: float) -> str:
    """Two gradients, each from clear, as rectangles of many steps: an id would be there twice on a page of two."""
    wide, steps = 420.0, 42
    cells = []
    for place in range(steps):
        share = (place + 0.5) / steps
        ink, opacity = colour(2 * share if share < 0.5 else top ** (2 * share - 1), top)
        cells.append(
            f'<rect class="step" x="{x + place * wide / steps:.1f}" y="{y:g}" width="{wide / steps:.2f}" height="13" '
            f'fill="{ink}" fill-opacity="{opacity:.2f}"/>'
        )
    marks = "".join(
        f'<text x="{x + place * wide:.1f}" y="{y + 28:g}" text-anchor="{"middle" if place else "start"}">{mark}</text>'
        for place, mark in ticks(top)
    )
    words = "load, over a fair share; × is a dead expert"
    return f'{"".join(cells)}{marks}<text x="{x + wide + 40:.1f}" y="{y + 11:g}">{words}</text>'


def _cross(x: float, y: float, step: float) -> str:
    half = min(step, _ROW) / 2 - 2
    if half < 1:
        return ""
    x, y = x + step / 2, y + _ROW / 2 - 0.5
    return (
        f'<path d="M{x - half:.2f} {y - half:.2f}l{2 * half:.2f} {2 * half:.2f}'
        f'm0 {-2 * half:.2f}l{-2 * half:.2f} {2 * half:.2f}"/>'
    )


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else "…" + label[1 - _LONGEST :]
