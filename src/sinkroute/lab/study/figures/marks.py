"""What the figures share: intervals with their seeds, labels that keep apart, axes that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sinkroute.lab.page.drawing import WIDTH, Theme, inline, short, style
from sinkroute.lab.page.palette import Ink
from sinkroute.lab.study.statistics import Estimate

__all__ = ["GAP", "apart", "end_labels", "fit", "interval", "muted", "no_data", "reach", "round_ticks", "rows"]

GAP = 12.5
"""Points between two labels at the end of curves."""


def no_data(name: str, theme: Theme, text: str) -> str:
    """A figure that says why it shows nothing."""
    fig = Figure(figsize=(WIDTH, 1.6))
    ax = fig.add_axes((0.045, 0.1, 0.91, 0.8))
    style(ax, theme, grid="")
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=theme.muted, fontsize=11)
    ax.set_xticks([])
    ax.set_yticks([])
    return inline(fig, name, text)


def muted(ax: Axes, theme: Theme, text: str, at: tuple[float, float], shift: tuple[float, float], **how: Any) -> None:
    """A remark at a place of the axes (in their fraction, unless `xycoords` says otherwise), shifted in points."""
    told: Any = {"xycoords": "axes fraction", "color": theme.muted, "fontsize": 9, "annotation_clip": False, **how}
    ax.annotate(text, at, shift, textcoords="offset points", **told)


def rows(ax: Axes, theme: Theme, labels: Sequence[tuple[int, str]], width: int) -> None:
    """A row for each (method, label), the first on top; the label is in the method's colour."""
    style(ax, theme, grid="x")
    ax.spines["bottom"].set_visible(False)
    ax.set_ylim(len(labels) - 0.5, -0.55)
    ax.set_yticks(range(len(labels)), [short(label, width) for _, label in labels])
    for (which, _), tick in zip(labels, ax.get_yticklabels(), strict=True):
        tick.set(color=theme.words[which], fontweight="bold", fontsize=10, gid=f"m m{which}")


def interval(
    ax: Axes, theme: Theme, ink: Ink, which: int, row: int, found: Estimate, seeds: Sequence[float], text: str
) -> None:
    """A mean with its band and the dots of its seeds in a row, and words behind it."""
    colour, gid = theme.methods[which], f"m m{which}"
    if found.half is not None:
        band = [found.mean - found.half, found.mean + found.half]
        ax.plot(band, [row, row], color=colour, linewidth=5, alpha=0.28, solid_capstyle="round", gid=gid)
    if len(seeds) > 1:
        ax.plot(seeds, [row] * len(seeds), "o", markersize=4, color=colour, alpha=0.7, markeredgewidth=0, gid=gid)
    ax.plot([found.mean], [row], marker=ink.marker, markersize=9.5, color=colour, markeredgewidth=0, gid=gid)
    muted(ax, theme, text, (1, row), (12, 0), xycoords=("axes fraction", "data"), color=theme.ink, va="center", gid=gid)


def fit(values: Sequence[float], pad: float) -> tuple[float, float]:
    """Limits around what is finite, with a part of the range on both sides."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    room = (high - low) * pad or max(abs(high), 1.0) * 0.05
    return low - room, high + room


def reach(seeds: Sequence[float], others: Sequence[float], least: float = 1e-9) -> tuple[float, float] | None:
    """Limits by which every seed is seen, and of other values those near by; None without a seed.

    A value far away would squeeze all seeds into one dot. `least` is how far apart seeds are taken to be.
    """
    finite = [value for value in seeds if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    room = max(high - low, least)
    near = [value for value in others if low - 1.2 * room <= value <= high + 1.2 * room]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.12 * (high - low or room)
    return low - pad, high + pad


def round_ticks(number: int, integer: bool = False) -> MaxNLocator:
    return MaxNLocator(number, steps=[1, 2, 2.5, 5, 10], integer=integer)


def apart(targets: Sequence[float], gap: float) -> list[float]:
    """The positions nearest to `targets` (least squares) that keep their order and at least `gap` between them.

    Pool adjacent violators: labels that collide form a block around their common mean.

    >>> apart([0.0, 100.0, 1.0], 10.0)
    [-4.5, 100.0, 5.5]
    """
    order = sorted(range(len(targets)), key=lambda i: targets[i])
    blocks: list[tuple[float, int]] = []  # (sum of shifted targets, count)
    for rank, i in enumerate(order):
        blocks.append((targets[i] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = (blocks[-1][0] + total, blocks[-1][1] + count)
    shifted = [total / count for total, count in blocks for _ in range(count)]
    out = [0.0] * len(targets)
    for rank, i in enumerate(order):
        out[i] = shifted[rank] + rank * gap
    return out


def end_labels(ax: Axes, theme: Theme, ends: Sequence[tuple[int, float, float, str]]) -> None:
    """Labels right of the axes, one per (method, x, y, text), each with a thin line to the end of its curve.

    A curve that ends well before the right edge has its label at its end. Limits and the place of the axes must be
    final, for the labels are pushed apart in points.
    """
    low, high = ax.get_xlim()
    scale = 72.0 / ax.figure.dpi
    late = [end for end in ends if end[1] >= low + 0.85 * (high - low)]
    heights = [float(ax.transData.transform((x, y))[1]) * scale for _, x, y, _ in late]
    edge = float(ax.transAxes.transform((1, 0))[0]) * scale
    places = dict(zip(late, apart(heights, GAP), strict=True))
    for end in ends:
        which, x, y, text = end
        start, colour = ax.transData.transform((x, y)) * scale, theme.words[which]
        if end not in places:
            ax.annotate(short(text, 36), (x, y), (4, 10), textcoords="offset points", color=colour, fontsize=9.5,
                        fontweight="bold", gid=f"m m{which} halo", zorder=6)  # fmt: skip
            continue
        ax.annotate(
            short(text, 20), (x, y), (edge + 20 - start[0], places[end] - start[1]), textcoords="offset points",
            color=colour, fontsize=9.5, fontweight="bold", va="center", annotation_clip=False, gid=f"m m{which}",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.6, "shrinkA": 2, "shrinkB": 3,
                        "relpos": (0, 0.5), "gid": f"m m{which}"},
        )  # fmt: skip
