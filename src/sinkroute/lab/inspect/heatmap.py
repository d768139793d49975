"""Layers × experts as an SVG that belongs to the page it stands in; every cell says its number where one points at it.

Colours are those of `sinkroute.lab.page.loads`; dead experts are crossed out.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sinkroute.lab.inspect.result import Layer
from sinkroute.lab.page.loads import LEAST_TOP, colour, ticks
from sinkroute.lab.page.palette import OVER, UNDER

__all__ = ["bars_svg", "heatmap_svg"]

_WIDTH, _ROW, _LETTER, _LONGEST = 1000.0, 17.0, 7.4, 28


def heatmap_svg(layers: Sequence[Layer], labels: Sequence[str]) -> str:
    """A row for every layer with a load, a column for every expert.

    Args:
        layers: those with a load are drawn.
        labels: of all of them.
    """
    drawn = [(label, layer) for label, layer in zip(labels, layers, strict=True) if layer.load is not None]
    most = max((len(layer.relative()) for _, layer in drawn), default=0)
    if not most:
        return ""
    top = max(LEAST_TOP, *(max(layer.relative()) for _, layer in drawn))
    left = 34 + _LETTER * max(5, *(len(_short(label)) for label, _ in drawn))
    step, height = (_WIDTH - left) / most, _ROW * len(drawn)
    out = [
        f'<svg class="plot heat" viewBox="0 0 {_WIDTH:g} {height + 84:g}" role="img" '
        'aria-label="Load of every expert, by layer">',
        f'<text transform="translate(12 {height / 2:g}) rotate(-90)" text-anchor="middle">layer</text>',
    ]
    for row, (label, layer) in enumerate(drawn):
        y, dead = row * _ROW, set(layer.dead)
        out.append(f'<text x="{left - 8:g}" y="{y + 13:g}" text-anchor="end">{escape(_short(label))}</text>')
        for expert, load in enumerate(layer.relative()):
            x, (ink, opacity) = left + expert * step, colour(load, top)
            told = f"{label}, expert {expert}: {load:.2f} of a fair share{', dead' if expert in dead else ''}"
            out.append(
                f'<g class="cell{" dead" if expert in dead else ""}"><title>{escape(told)}</title>'
                f'<rect x="{x:.2f}" y="{y:g}" width="{step:.2f}" height="{_ROW - 1:g}" fill="{ink}" '
                f'fill-opacity="{opacity:.2f}"/>{_cross(x, y, step) if expert in dead else ""}</g>'
            )
    every = next(size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if size * step >= 28 or size > most)
    out += [
        f'<text x="{left + (expert + 0.5) * step:.2f}" y="{height + 14:g}" text-anchor="middle">{expert}</text>'
        for expert in range(0, most, every)
    ]
    out.append(f'<text x="{(left + _WIDTH) / 2:.2f}" y="{height + 31:g}" text-anchor="middle">expert</text>')
    return "".join([*out, _scale(left, height + 44, top), "</svg>"])


def bars_svg(layer: Layer) -> str:
    """The loads of a layer from the largest to the smallest; the line is a fair share."""
    loads = sorted(layer.relative(), reverse=True)
    if not loads:
        return ""
    top, step = max(3.0, loads[0]), 120 / len(loads)
    width = max(step - (step > 3), 0.4)
    points = "".join(
        f"M{place * step:.1f} 24h{width:.1f}v{-24 * load / top:.2f}h{-width:.1f}z" for place, load in enumerate(loads)
    )
    fair = 24 - 24 / top
    return (
        f'<svg class="bars" viewBox="0 0 120 24" aria-hidden="true"><path d="{points}"/>'
        f'<path class="fair" d="M0 {fair:.2f}H120"/></svg>'
    )


def _scale(x: float, y: float, top: float) -> str:
    wide = 420.0
    marks = "".join(
        f'<text x="{x + place * wide:.1f}" y="{y + 28:g}" text-anchor="{"middle" if place else "start"}">{mark}</text>'
        for place, mark in ticks(top)
    )
    return (
        f'<linearGradient id="loads"><stop stop-color="{UNDER}"/><stop offset=".5" stop-color="{UNDER}" '
        f'stop-opacity="0"/><stop offset=".5" stop-color="{OVER}" stop-opacity="0"/><stop offset="1" '
        f'stop-color="{OVER}"/></linearGradient><rect x="{x:.1f}" y="{y:g}" width="{wide:g}" height="13" '
        f'fill="url(#loads)"/>{marks}<text x="{x + wide + 40:.1f}" y="{y + 11:g}">load, over a fair share; × is a dead '
        "expert</text>"
    )


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
