"""The figures of a comparison: paired differences, lines over a grid, gains over size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from sinkroute.lab.page.drawing import WIDTH, Theme, heading, inline, page_theme, settings, short, style
from sinkroute.lab.page.palette import Ink
from sinkroute.lab.study.cells import short_value
from sinkroute.lab.study.comparison import BILLION, SizeTrend
from sinkroute.lab.study.figures.marks import fit, interval, muted, reach, round_ticks, rows
from sinkroute.lab.study.metric import Metric
from sinkroute.lab.study.results import Results

__all__ = ["Grid", "forest_figure", "grid_figure", "grids", "size_figure"]

_TOLD = ("better", "worse", "equivalent")
"""Verdicts that stand behind a difference."""


@dataclass(frozen=True)
class Grid:
    """The methods of one family that have a number as their axis.

    Attributes:
        family: the method's name in the file.
        key: dotted key of the axis.
        lines: other values of the grid, in words → (value on the axis, method) in the order of the axis.
    """

    family: str
    key: str
    lines: dict[str, list[tuple[float, str]]]


def grids(found: Results) -> list[Grid]:
    """Every grid with a numeric axis of two values or more; the longest one is the axis."""
    out = []
    for family in dict.fromkeys(family for family, _ in found.points.values()):
        points = {method: dict(point) for method, (own, point) in found.points.items() if own == family}
        values: dict[str, set[Any]] = {}
        for point in points.values():
            for key, value in point.items():
                values.setdefault(key, set()).add(value)
        numeric = [
            key
            for key, several in values.items()
            if len(several) > 1 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in several)
        ]
        if not numeric:
            continue
        axis = max(numeric, key=lambda key: len(values[key]))
        lines: dict[str, list[tuple[float, str]]] = {}
        for method, point in points.items():
            rest = {key: value for key, value in point.items() if key != axis and len(values[key]) > 1}
            words = ", ".join(f"{key.rpartition('.')[2]}={short_value(value)}" for key, value in rest.items()) or family
            lines.setdefault(words, []).append((float(point[axis]), method))
        out.append(Grid(family, axis, {words: sorted(line) for words, line in lines.items()}))
    return out


def forest_figure(results: Results, size: str, metric: Metric, inks: Sequence[Ink], name: str) -> str:
    """Paired differences to the reference at one size: a line for each method, a dot for each seed."""
    methods = results.methods
    reference = results.entries[size, results.reference, metric.key]
    shown = [each for method in methods if (each := results.entries[size, method, metric.key]).against is not None]
    if not shown:
        return ""
    theme, digits = page_theme(len(methods)), metric.digits
    with settings("none"):
        tall = 0.95 + 0.34 * max(len(shown), 2)
        fig = Figure(figsize=(WIDTH, tall))
        left = min(max(0.03 + 0.0085 * max(len(entry.method) for entry in shown), 0.16), 0.42)
        ax = fig.add_axes((left, 0.42 / tall, 0.77 - left, 1 - 0.85 / tall))
        rows(ax, theme, [(methods.index(entry.method), entry.method) for entry in shown], 42)
        ax.axvline(0, color=theme.muted, linewidth=1.1, zorder=1)
        seeds, ends = [0.0], []
        for row, entry in enumerate(shown):
            assert entry.against is not None
            found, which = entry.against.paired.difference, methods.index(entry.method)
            half = "" if found.half is None else f" ± {found.half:.{digits}f}"
            words = f"{found.mean:+.{digits}f}{half} {entry.against.verdict * (entry.against.verdict in _TOLD)}"
            own = [value - reference.values[seed] for seed, value in entry.values.items() if seed in reference.values]
            interval(ax, theme, inks[which], which, row, found, own, words)
            seeds += own
            ends += [found.mean - (found.half or 0), found.mean + (found.half or 0)]
        ax.set_xlim(*reach(seeds, ends) or (-1, 1))
        ax.xaxis.set_major_locator(round_ticks(6))
        better = "← better" if metric.lower_is_better else "better →"
        heading(ax, theme, f"{metric.title} against {short(results.reference)}", better)
        return inline(fig, name, f"{metric.title} against {results.reference}, by method")


def grid_figure(found: Results, grid: Grid, size: str, metrics: Sequence[Metric], name: str) -> str:
    """Metrics over the axis of a grid, side by side: a line for each other point of the grid, and the reference."""
    theme = page_theme(len(found.methods))  # a line has the colour of its first method
    lines = [(found.methods.index(line[0][1]), words, line) for words, line in grid.lines.items()]
    positions = sorted({value for *_, line in lines for value, _ in line})
    with settings("none"):
        foot = 0.22 * math.ceil(len(lines) / 3)
        tall = 3.5 + foot
        fig = Figure(figsize=(WIDTH, tall))
        for place, metric in enumerate(metrics):
            ax = fig.add_axes((0.06 + 0.49 * place, (foot + 0.5) / tall, 0.36, 2.5 / tall))
            style(ax, theme)
            if (whole := found.entries[size, found.reference, metric.key].estimate) is not None:
                ax.axhline(whole.mean, color=theme.muted, linewidth=1.1, dashes=(4, 3))
                muted(ax, theme, short(found.reference), (1, whole.mean), (4, 0),
                      xycoords=("axes fraction", "data"), va="center")  # fmt: skip
            for which, _, line in lines:
                entries = [(x, found.entries[size, method, metric.key]) for x, method in line]
                there = [(x, each.estimate.mean) for x, each in entries if each.estimate is not None]
                seeds = [(x, value) for x, each in entries for value in each.values.values() if len(each.values) > 1]
                shape: Any = {"color": theme.methods[which], "gid": f"m m{which}"}
                ax.plot(*np.reshape(there, (-1, 2)).T, linewidth=1.6, marker="o", markersize=5, **shape)
                ax.plot(*np.reshape(seeds, (-1, 2)).T, linestyle="", marker="_", markersize=6, alpha=0.6, **shape)
            if positions[0] > 0 and positions[-1] / positions[0] >= 20:
                ax.set_xscale("log")
                ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xticks(positions, [f"{value:g}" for value in positions])
            ax.set_xlabel(grid.key.rpartition(".")[2])
            heading(ax, theme, metric.title)
        for place, (which, words, _) in enumerate(lines):
            fig.text(0.07 + 0.31 * (place % 3), (foot - 0.22 * (place // 3 + 0.4)) / tall, f"● {short(words, 40)}",
                     color=theme.words[which], fontsize=9, gid=f"m m{which}")  # fmt: skip
        return inline(fig, name, f"{grid.family} over {grid.key}")


def size_figure(found: Results, inks: Sequence[Ink]) -> str:
    """Paired gains over the active parameters, a dot for each seed, with the trends drawn on to 10⁹."""
    if not found.trends:
        return ""
    theme = page_theme(len(found.methods))
    columns = min(3 if max(len(each.method) for each in found.trends) < 26 else 2, len(found.trends))
    lines = math.ceil(len(found.trends) / columns)
    with settings("none"):
        tall = 0.7 + 2.3 * lines
        fig = Figure(figsize=(WIDTH, tall))
        # One scale for all panels, by the gains that were measured: extrapolated bands run out of the picture.
        limits = fit([0.0, *(gain for each in found.trends for _, _, gain in each.points)], 1.0)
        where = {"left": 0.07, "right": 0.985, "bottom": 0.6 / tall, "top": 1 - 0.45 / tall, "hspace": 0.45}
        grid = fig.subplots(lines, columns, squeeze=False, gridspec_kw=where)
        for ax, each in zip(grid.flat, found.trends, strict=False):
            _trend(ax, theme, inks, found.methods.index(each.method), each)
            ax.set_ylim(*limits)
        for ax in grid.flat[len(found.trends) :]:
            ax.remove()
        fig.text(0.07, 0.1 / tall, "across: active parameters · up: gain", color=theme.muted, fontsize=9)
        return inline(fig, "sizes", "Gain over the reference by active parameters")


def _trend(ax: Axes, theme: Theme, inks: Sequence[Ink], which: int, each: SizeTrend) -> None:
    style(ax, theme, grid="both")
    ax.axhline(0, color=theme.muted, linewidth=1.1)
    ax.set_xscale("log", base=10)
    ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    ax.xaxis.set_minor_locator(NullLocator())
    shape: Any = {"color": theme.methods[which], "gid": f"m m{which}"}
    active = [float(at) for at, _, _ in each.points]
    span = np.geomspace(min(active), BILLION, 60)
    middle, *halves = np.array([each.line.at(math.log2(at)) for at in span], dtype=float).T
    seen = span <= max(active)
    ax.plot(span[seen], middle[seen], linewidth=1.8, **shape)
    ax.plot(span[~seen], middle[~seen], linewidth=1.2, dashes=(4, 3), **shape)
    for half, alpha in zip(halves, (0.2, 0.1), strict=True):
        ax.fill_between(span, middle - half, middle + half, alpha=alpha, linewidth=0, **shape)
    gains = [gain for _, _, gain in each.points]
    ax.plot(active, gains, inks[which].marker, markersize=4.5, alpha=0.8, markeredgewidth=0, **shape)
    heading(ax, theme, short(each.method, 44), lift=8)
