"""Layers × experts as an SVG that belongs to the page it stands in.

As in the lab's report a balanced expert is clear, so it shows whatever ground the page has; blue is less than a fair
share, orange more, up to three times. Dead experts are crossed out. Every cell says its number where one points at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sinkroute.lab.inspect.result import Layer
from sinkroute.lab.page.palette import OVER, UNDER

__all__ = ["bars_svg", "heatmap_svg"]

_CLIP = 3.0
_WIDTH, _MARGIN, _ROW = 1000.0, 90.0, 16.0


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
    step = (_WIDTH - _MARGIN) / most
    height = _ROW * len(drawn) + 22
    out = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="Load of every expert, by layer">'
    ]
    for row, (label, layer) in enumerate(drawn):
        y = row * _ROW
        out.append(f'<text x="{_MARGIN - 8:g}" y="{y + 12:g}" text-anchor="end">{escape(_short(label))}</text>')
        for expert, load in enumerate(layer.relative()):
            x = _MARGIN + expert * step
            colour, opacity = _colour(load)
            told = f"{label}, expert {expert}: {'dead' if load == 0 else f'{load:.2f} of a fair share'}"
            out.append(
                f'<g class="cell{" dead" if load == 0 else ""}"><title>{escape(told)}</title>'
                f'<rect x="{x:.2f}" y="{y:g}" width="{step:.2f}" height="{_ROW - 1:g}" fill="{colour}" '
                f'fill-opacity="{opacity:.2f}"/>{_cross(x, y, step) if load == 0 else ""}</g>'
            )
    every = next(size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if size * step >= 26 or size > most)
    out += [
        f'<text x="{_MARGIN + (expert + 0.5) * step:.2f}" y="{height - 6:g}" text-anchor="middle">{expert}</text>'
        for expert in range(0, most, every)
    ]
    return "".join([*out, "</svg>"])


def bars_svg(layer: Layer) -> str:
    """The loads of a layer from the largest to the smallest; the line is a fair share."""
    loads = sorted(layer.relative(), reverse=True)
    if not loads:
        return ""
    top, step = max(_CLIP, loads[0]), 120 / len(loads)
    width = max(step - (step > 3), 0.4)
    points = "".join(
        f"M{place * step:.1f} 24h{width:.1f}v{-24 * load / top:.2f}h{-width:.1f}z" for place, load in enumerate(loads)
    )
    fair = 24 - 24 / top
    return (
        f'<svg class="bars" viewBox="0 0 120 24" aria-hidden="true"><path d="{points}"/>'
        f'<path class="fair" d="M0 {fair:.2f}H120"/></svg>'
    )


def _colour(load: float) -> tuple[str, float]:
    """
    >>> _colour(1.0)[1], _colour(0.0), _colour(9.0)
    (0.0, ('#2f80c8', 1.0), ('#d9580a', 1.0))
    """
    off = 1 - load if load < 1 else (min(load, _CLIP) - 1) / (_CLIP - 1)
    return (UNDER if load < 1 else OVER), off**0.8


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
    return label if len(label) <= 14 else "…" + label[-13:]
