"""Where methods stand: the metric in validation, a line each; quality against balance; and the README's picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sinkroute.lab.page.drawing import WIDTH, Theme, heading, inline, page_theme, paper_theme, settings, short, style
from sinkroute.lab.page.palette import Ink
from sinkroute.lab.study.arrange import describe
from sinkroute.lab.study.figures.curves import balance_panel
from sinkroute.lab.study.figures.marks import fit, interval, muted, no_data, reach, round_ticks, rows
from sinkroute.lab.study.metric import Quality
from sinkroute.lab.study.runs import Group, common_metric
from sinkroute.lab.study.statistics import Estimate

__all__ = ["picture", "scatter_figure", "standing_figure"]


def standing_figure(groups: Sequence[Group], inks: Sequence[Ink], baselines: Mapping[str, Any]) -> str:
    """The metric in validation, one line per method."""
    with settings("none"):
        height = 0.85 + 0.4 * max(len(groups), 2)
        fig = Figure(figsize=(WIDTH, height))
        left = min(max(0.03 + 0.0085 * max(len(group.label) for group in groups), 0.16), 0.36)
        ax = fig.add_axes((left, 0.36 / height, 0.89 - left, 1 - 0.76 / height))
        _panel(ax, page_theme(len(inks)), inks, groups, baselines)
        return inline(fig, "standing", f"Validation {_metric(groups).title} of each method")


def scatter_figure(groups: Sequence[Group], inks: Sequence[Ink]) -> str:
    """The metric in validation against serving MaxVio: a large mark per method, a small one per seed."""
    theme, metric = page_theme(len(inks)), _metric(groups)
    pairs = [(group, [(run.value("serving", "max_vio"), run.quality) for run in group.finished]) for group in groups]
    clouds = [
        (group, np.array(found))
        for group, all_of in pairs
        if (found := [pair for pair in all_of if all(value is not None and math.isfinite(value) for value in pair)])
    ]
    with settings("none"):
        if not clouds:
            return no_data("scatter", theme, "no finished run to place yet")
        fig = Figure(figsize=(WIDTH, 4.0))
        ax = fig.add_axes((0.06, 0.125, 0.7, 0.77))
        style(ax, theme, grid="both")
        everything = np.concatenate([points for _, points in clouds])
        ax.set(xlim=(0, float(everything[:, 0].max()) * 1.12 or 1.0), ylim=fit(everything[:, 1].tolist(), 0.2))
        ax.xaxis.set_major_locator(round_ticks(7))
        ax.yaxis.set_major_locator(round_ticks(6))
        ax.set_xlabel("MaxVio in serving (smaller is more even)", fontsize=9)
        heading(ax, theme, f"Validation {metric.title}", "(smaller is better), axis does not start at 0")
        muted(ax, theme, "better", (0, 0), (34, 30),
              arrowprops={"arrowstyle": "-|>", "color": theme.muted, "lw": 1.0, "shrinkB": 6})  # fmt: skip
        for group, points in clouds:
            shape: Any = {"color": theme.methods[group.place], "gid": f"m m{group.place}", "markeredgewidth": 0}
            marker, (x, y) = inks[group.place].marker, points.mean(axis=0)
            for px, py in points if len(points) > 1 else ():
                ax.plot([x, px], [y, py], linewidth=0.8, alpha=0.45, **shape)
                ax.plot(px, py, marker, markersize=4.5, alpha=0.55, **shape)
            ax.plot(x, y, marker, markersize=11, label=short(group.label), **shape)
        colours = [theme.words[group.place] for group, _ in clouds]
        ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9.5, labelcolor=colours)
        return inline(fig, "scatter", f"Validation {metric.title} against serving MaxVio")


def picture(groups: Sequence[Group], inks: Sequence[Ink], baselines: Mapping[str, Any], path: Path) -> None:
    """Write the picture of the README: the metric in validation on the left, MaxVio over training on the right."""
    theme, svg = paper_theme(inks), path.suffix.lower() == ".svg"
    with settings("path"):
        fig = Figure(figsize=(12.2, max(3.7, 1.3 + 0.42 * len(groups))), facecolor="#fdfdfb", dpi=170)
        (FigureCanvasSVG if svg else FigureCanvasAgg)(fig)
        left, right = fig.add_axes((0.17, 0.15, 0.27, 0.66)), fig.add_axes((0.54, 0.15, 0.29, 0.66))
        _panel(left, theme, inks, groups, baselines, width=20)
        heading(left, theme, f"Validation {_metric(groups).title}", "lower is better", lift=25)
        balance_panel(right, theme, inks, groups, lift=25)
        nothing = {"Date": None, "Creator": None} if svg else {"Software": None}
        with path.open("wb") as file:
            fig.savefig(file, format="svg" if svg else "png", metadata=nothing)


def _metric(groups: Sequence[Group]) -> Quality:
    return common_metric([run for group in groups for run in group.runs])


def _panel(
    ax: Axes, theme: Theme, inks: Sequence[Ink], groups: Sequence[Group], baselines: Mapping[str, Any], width: int = 36
) -> None:
    metric = _metric(groups)
    rows(ax, theme, [(group.place, group.label) for group in groups], width)
    told = {group.place: (values, Estimate.of(values)) for group in groups if (values := group.qualities)}
    ngrams = [bits for _, bits in describe(baselines)]
    seeds = [value for values, _ in told.values() for value in values]
    ends = [each.mean + sign * each.half for _, each in told.values() if each.half is not None for sign in (-1, 1)]
    ax.set_xlim(*reach(seeds, [*ends, *ngrams], 0.02) or fit([*ngrams, 0.0, 8.0], 0))
    ax.xaxis.set_major_locator(round_ticks(6))
    _references(ax, theme, baselines)
    for row, group in enumerate(groups):
        values, each = told.get(group.place, ([], None))
        if each is not None and math.isfinite(each.mean):
            interval(ax, theme, inks[group.place], group.place, row, each, values, metric.text(each.mean))
            continue
        text = "not finished" if each is None else f"diverged ({each.mean})"
        muted(ax, theme, text, (0, row), (6, 0), xycoords=("axes fraction", "data"), va="center", style="italic")


def _references(ax: Axes, theme: Theme, baselines: Mapping[str, Any]) -> None:
    """Dashed lines of the n-gram models, with their names above; those beyond an edge are named there."""
    left, right = ax.get_xlim()
    named = [(f"{short(name)} {bits:.3f}", bits) for name, bits in describe(baselines)]
    inside = [(text, bits) for text, bits in named if left <= bits <= right]
    for text, bits in inside:
        ax.axvline(bits, color=theme.muted, linewidth=0.9, dashes=(4, 3), zorder=1)
        muted(ax, theme, text, (bits, 1), (0, 2), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    rise = 15 if inside else 3
    if below := [text for text, bits in named if bits < left]:
        muted(ax, theme, "← " + ", ".join(below), (0, 1), (0, rise))
    if above := [text for text, bits in named if bits > right]:
        muted(ax, theme, ", ".join(above) + " →", (1, 1), (0, rise), ha="right")
