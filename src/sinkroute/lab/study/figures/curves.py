"""Curves over training, one for each method: the loss, and MaxVio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from sinkroute.lab.page.drawing import WIDTH, Theme, heading, inline, page_theme, settings, short, style
from sinkroute.lab.page.palette import Ink
from sinkroute.lab.study.arrange import describe
from sinkroute.lab.study.figures.history import Curve, curve, evaluations, sinkhorn_share
from sinkroute.lab.study.figures.marks import GAP, end_labels, fit, muted, no_data, round_ticks
from sinkroute.lab.study.metric import capital
from sinkroute.lab.study.runs import Group, common_metric

__all__ = ["balance_figure", "balance_panel", "training_figure"]

_Lines = list[tuple[Group, Curve]]


def training_figure(groups: Sequence[Group], inks: Sequence[Ink], baselines: Mapping[str, Any]) -> str:
    """The training loss in the runs' metric: the whole run on the left, its last 60 % on the right."""
    theme, metric = page_theme(len(inks)), common_metric([run for group in groups for run in group.runs])
    lines = _drawable(groups, "loss")
    with settings("none"):
        if not lines:
            return no_data("training", theme, "no training loss in the logs yet")
        fig = Figure(figsize=(WIDTH, 4.3))
        whole, close = (fig.add_axes((left, 0.115, width, 0.76)) for left, width in ((0.045, 0.30), (0.405, 0.41)))
        end = max(float(line.steps[-1]) for _, line in lines)
        start = 0.4 * end
        for ax in (whole, close):
            _draw(ax, theme, inks, lines)
            for group, _ in lines:
                for point in evaluations(group.drawn):
                    if ax is whole or point[0] >= start:
                        ax.plot(*point, "o", markersize=4.5, markerfacecolor="none", markeredgewidth=1.2, clip_on=False,
                                markeredgecolor=theme.methods[group.place], gid=f"m m{group.place}")  # fmt: skip
            ax.xaxis.set_major_locator(round_ticks(5, integer=True))
            ax.set_xlabel("training step", fontsize=9)
        whole.set_xlim(0, end)
        close.set_xlim(start, end)
        raws = np.concatenate([line.raw for _, line in lines])
        raws = raws[np.isfinite(raws)]
        log = bool(metric.logarithmic and raws.min() > 0)
        if log:
            whole.set_yscale("log")
            whole.set_ylim(raws.min() / 1.15, raws.max() * 1.15)
            _plain_log(whole, LogLocator(subs=(1, 2, 5)))
        else:
            whole.set_ylim(*fit([*raws, *(bits for _, bits in describe(baselines))], 0.06))
        sides = [side[line.steps >= start] for _, line in lines for side in (line.low, line.high, line.mean)]
        seen = [value for value in np.concatenate(sides) if np.isfinite(value)]
        seen += [value for group, _ in lines for step, value in evaluations(group.drawn) if step >= start]
        close.set_ylim(*fit(seen or list(raws), 0.1))
        heading(whole, theme, "Whole run", metric.curve + ", logarithmic" * log)
        heading(close, theme, "From 40 % on", f"{metric.curve}, magnified")
        for ax in (whole, close):
            _references(ax, theme, baselines, lines)
        ends = [(group.place, *line.last, _named(group, line)) for group, line in lines]
        end_labels(close, theme, [one for one in ends if one[1] >= start])
        for rank, (which, _, _, text) in enumerate(one for one in ends if one[1] < start):
            muted(close, theme, f"× {short(text, 40)}: see left", (0, 0), (8, 8 + rank * GAP),
                  color=theme.words[which], gid=f"m m{which}")  # fmt: skip
        return inline(fig, "training", f"{capital(metric.curve)} over training steps, one curve per method")


def balance_figure(groups: Sequence[Group], inks: Sequence[Ink]) -> str:
    """MaxVio over training, with the share of Sinkhorn calls of the selective methods below."""
    theme, selective = page_theme(len(inks)), [group for group in groups if group.selective]
    with settings("none"):
        if not _drawable(groups, "max_vio"):
            return no_data("balance", theme, "no MaxVio in the logs yet")
        strip = 0.26 * len(selective) + 0.18 if selective else 0.0
        height = 4.1 + strip
        fig = Figure(figsize=(WIDTH, height))
        bottom = (0.5 + strip) / height
        ax = fig.add_axes((0.045, bottom, 0.77, 1 - bottom - 0.42 / height))
        balance_panel(ax, theme, inks, groups)
        if selective:
            ax.tick_params(labelbottom=False)
            ax.set_xlabel("")
            low = fig.add_axes((0.045, 0.5 / height, 0.77, (strip - 0.14) / height), sharex=ax)
            _shares(low, theme, selective)
        return inline(fig, "balance", "MaxVio over training steps, one curve per method")


def balance_panel(ax: Axes, theme: Theme, inks: Sequence[Ink], groups: Sequence[Group], lift: float = 11) -> None:
    """MaxVio over training; without any in the logs, axes with a heading."""
    lines = _drawable(groups, "max_vio")
    _draw(ax, theme, inks, lines)
    sides = [side[np.isfinite(side)] for _, line in lines for side in (line.mean, line.low, line.high)]
    values = np.concatenate([*sides, [] if lines else [1.0]])
    # Methods that differ by more than a factor of 20 cannot be read on one linear axis.
    log = bool(values.min() > 0 and values.max() / values.min() > 20)
    if log:
        ax.set_yscale("log")
        _plain_log(ax, FixedLocator([step * 10.0**power for power in range(-3, 2) for step in (1, 2, 5)]))
        ax.set_ylim(values.min() / 1.15, values.max() * 1.15)
    else:
        ax.set_ylim(min(0.0, float(values.min())), float(values.max()) * 1.06 or 1.0)
        ax.yaxis.set_major_locator(round_ticks(6))
    ax.set_xlim(0, max((float(line.steps[-1]) for _, line in lines), default=1.0))
    ax.xaxis.set_major_locator(round_ticks(8, integer=True))
    ax.set_xlabel("training step", fontsize=9)
    heading(ax, theme, "MaxVio", "mean over layers" + ", logarithmic" * log + "; 0 = perfectly even", lift)
    end_labels(ax, theme, [(group.place, *line.last, _named(group, line)) for group, line in lines])


def _drawable(groups: Sequence[Group], key: str) -> _Lines:
    return [(group, line) for group in groups if (line := curve(group.drawn, key)).drawable]


def _draw(ax: Axes, theme: Theme, inks: Sequence[Ink], lines: _Lines) -> None:
    style(ax, theme)
    for group, line in lines:
        colour, gid, marker = theme.methods[group.place], f"m m{group.place}", inks[group.place].marker
        if line.seeds > 1:
            ax.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.16, linewidth=0, gid=gid)
        elif len(line.steps) >= 12:
            ax.plot(line.steps, line.raw, color=colour, linewidth=0.8, alpha=0.28, gid=gid)
        ax.plot(line.steps, line.mean, color=colour, linewidth=1.9, gid=gid, solid_capstyle="round", markersize=5,
                marker=marker if len(line.steps) < 4 else None)  # fmt: skip
        stopped = bool(_stop(group, line)) or line.last[0] < line.steps[-1]
        ax.plot(*line.last, color=colour, gid=gid, zorder=4, clip_on=False, marker="x" if stopped else marker,
                markersize=7 if stopped else 5, markeredgewidth=1.8 if stopped else 0)  # fmt: skip


def _stop(group: Group, line: Curve) -> str:
    """A word for a curve that ends before its time."""
    return "nan" if not np.isfinite(line.mean[-1]) else "" if group.finished else "interrupted"


def _named(group: Group, line: Curve) -> str:
    return " · ".join(part for part in (group.label, _stop(group, line)) if part)


def _plain_log(ax: Axes, locator: LogLocator | FixedLocator) -> None:
    """Ticks as plain numbers."""
    ax.yaxis.set_major_locator(locator)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _references(ax: Axes, theme: Theme, baselines: Mapping[str, Any], lines: _Lines) -> None:
    low, high = ax.get_ylim()
    for name, bits in describe(baselines):
        if low < bits < high:
            ax.axhline(bits, color=theme.muted, linewidth=0.9, dashes=(4, 3), zorder=1)
            # The curves fall: a line near their ends is labelled on the left, where they are far above it.
            left = any(-0.03 < (line.last[1] - bits) / (high - low) < 0.15 for _, line in lines)
            muted(ax, theme, f"{short(name)} {bits:.3f}", (0 if left else 1, bits), (3 if left else -3, 3),
                  xycoords=("axes fraction", "data"), ha="left" if left else "right")  # fmt: skip


def _shares(ax: Axes, theme: Theme, groups: Sequence[Group]) -> None:
    """A strip for each group: when it routed by Sinkhorn."""
    style(ax, theme, grid="")
    ax.set_ylim(len(groups), 0)
    ax.set_yticks([])
    ax.set_xlabel("training step", fontsize=9)
    found = [sinkhorn_share(group.drawn) for group in groups]
    most = max((float(share.max()) for _, share in found if share.size), default=1.0) or 1.0
    for row, (group, (steps, share)) in enumerate(zip(groups, found, strict=True)):
        if steps.size:
            ax.stairs(row + 0.92 - 0.8 * share / most, [0.0, *steps], baseline=row + 0.92, fill=True, linewidth=0,
                      color=theme.methods[group.place], alpha=0.85, gid=f"m m{group.place}")  # fmt: skip
        ax.axhline(row + 0.92, color=theme.grid, linewidth=0.7)
    muted(ax, theme, f"share of Sinkhorn\n(full bar = {most:.0%})", (1, 0.5), (20, 0), va="center")
