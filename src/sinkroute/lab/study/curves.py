"""The figures of the report, drawn as `drawing` says.

Heat maps suit light and dark pages by transparency: a balanced expert is a clear pixel, so it shows whatever ground the
page has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import blended_transform_factory

from sinkroute.lab.page.drawing import (
    WIDTH,
    Theme,
    heading,
    inline,
    page_theme,
    paper_theme,
    settings,
    short,
    style,
)
from sinkroute.lab.page.palette import OVER, UNDER, Ink
from sinkroute.lab.study.metric import Quality, capital
from sinkroute.lab.study.runs import Group, Run, common_metric
from sinkroute.lab.study.table import Spread, describe

__all__ = [
    "Curve",
    "balance_figure",
    "curve",
    "experts_figure",
    "load_history",
    "picture",
    "scatter_figure",
    "serving_figure",
    "smooth",
    "standing_figure",
    "training_figure",
]

_GAP = 12.5  # points between two labels at the end of curves
_CLIP = 3.0


# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Curve:
    """A quantity over training: the smoothed mean over seeds, the range over seeds, and the mean before smoothing."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    raw: np.ndarray
    seeds: int

    @property
    def drawable(self) -> bool:
        return bool(np.isfinite(self.mean).any())


def _places(groups: Sequence[Group]) -> list[int]:
    """Which ink of the page each method has."""
    return [group.place for group in groups]


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over an eighth of the points (none below 12 points); what is not finite stays so.

    The window is centred. At the start it shrinks evenly, for a curve that falls steeply would be bent; at the end it
    is cut off on one side, for there the noise of a single line would decide which curve seems to win.

    >>> smooth(np.array([1.0, 5.0])).tolist()
    [1.0, 5.0]
    """
    reach = max(1, len(values) // 16) if len(values) >= 12 else 0
    out = np.full(len(values), np.nan)
    for i in range(len(values)):
        if np.isfinite(values[i]):
            window = values[i - min(reach, i) : i + min(reach, i) + 1]
            out[i] = window[np.isfinite(window)].mean()
    return out


def curve(runs: Sequence[Run], key: str) -> Curve:
    """The curve of `key` ("loss", in the runs' metric, or "max_vio") over the steps of the runs.

    A step's mean is over the runs that have it.

    A seed that diverged makes the mean nan from there on: an average over the survivors would hide it.
    """
    at: dict[int, list[tuple[int, float]]] = {}
    for which, run in enumerate(runs):
        for line in run.train:
            value = _loss(line, run.metric) if key == "loss" else _max_vio(line)
            if value is not None:
                at.setdefault(int(line["step"]), []).append((which, value))
    steps = sorted(at)
    table = np.full((len(runs), len(steps)), np.nan)
    there = np.zeros(table.shape, dtype=bool)
    for column, step in enumerate(steps):
        for which, value in at[step]:
            table[which, column], there[which, column] = value, True
    count = np.maximum(there.sum(axis=0), 1)
    raw = np.where(there, table, 0.0).sum(axis=0) / count if len(steps) else np.zeros(0)
    smoothed = np.stack([smooth(row) for row in table]) if len(runs) else np.zeros((0, 0))
    low = np.where(np.isfinite(smoothed), smoothed, np.inf).min(axis=0, initial=np.inf)
    high = np.where(np.isfinite(smoothed), smoothed, -np.inf).max(axis=0, initial=-np.inf)
    raw = np.where(np.isfinite(raw), raw, np.nan)
    mean = smooth(raw)
    low, high = np.where(np.isfinite(mean), low, np.nan), np.where(np.isfinite(mean), high, np.nan)
    return Curve(np.array(steps, dtype=float), mean, low, high, raw, len(runs))


def load_history(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Loads relative to uniform over training.

    Returns:
        `edges`, of shape (N + 1,): line n covers the steps after `edges[n]` up to `edges[n + 1]`; and the loads, of
        shape (N, layers, E), 1 = a fair share. Both are empty if the log has no loads.
    """
    lines = []
    for line in run.train:
        try:
            load = np.asarray(line.get("load"), dtype=float)
        except (TypeError, ValueError):
            continue  # ragged or absent: nothing to draw for this line
        if load.ndim == 2 and load.size:
            lines.append((float(line["step"]), load))
    lines = [(step, load) for step, load in lines if load.shape == lines[-1][1].shape]
    if not lines:
        return np.zeros(0), np.zeros((0, 0, 0))
    edges = np.array([0.0] + [step for step, _ in lines])
    return edges, np.stack([_relative(load) for _, load in lines])


def _relative(load: np.ndarray) -> np.ndarray:
    mean = load.mean(axis=-1, keepdims=True)
    return np.divide(load, mean, out=np.full(load.shape, np.nan), where=mean > 0)


def _loss(line: Mapping[str, Any], metric: Quality) -> float | None:
    loss = line.get("loss")
    return metric.of_loss(float(loss)) if isinstance(loss, (int, float)) else None


def _max_vio(line: Mapping[str, Any]) -> float | None:
    layers = line.get("max_vio")
    if not isinstance(layers, list) or not layers:
        return None
    return sum(math.nan if value is None else float(value) for value in layers) / len(layers)


def _sinkhorn_share(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the share of the router calls up to each that ran Sinkhorn (any branch that is not softmax)."""
    total: dict[int, float] = {}
    chosen: dict[int, float] = {}
    for run in runs:
        for line in run.train:
            step = int(line["step"])
            for name, calls in (line.get("branches") or {}).items():
                total[step] = total.get(step, 0.0) + float(calls)
                chosen[step] = chosen.get(step, 0.0) + (0.0 if name == "softmax" else float(calls))
    steps = sorted(step for step in total if total[step] > 0)
    return np.array(steps, dtype=float), np.array([chosen[step] / total[step] for step in steps])


# -------------------------------------------------------------------------------------------------------------- pieces


def _apart(targets: Sequence[float], gap: float) -> list[float]:
    """The positions nearest to `targets` (least squares) that keep their order and at least `gap` between them.

    Pool adjacent violators: labels that collide form a block around their common mean.
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


def _end_labels(ax: Axes, theme: Theme, ends: Sequence[tuple[int, float, float, str]]) -> None:
    """Labels right of the axes, one per (method, x, y, text), each with a thin line to the end of its curve.

    A curve that ends well before the right edge has its label at its end. Limits and the place of the axes must be
    final, for the labels are pushed apart in points.
    """
    low, high = ax.get_xlim()
    early = [end for end in ends if end[1] < low + 0.85 * (high - low)]
    for which, x, y, text in early:
        ax.annotate(
            short(text, 36), (x, y), (4, 10), textcoords="offset points", color=theme.methods[which], fontsize=9.5,
            fontweight="bold", gid=f"m m{which} halo", zorder=6,
        )  # fmt: skip
    ends = [end for end in ends if end not in early]
    if not ends:
        return
    scale = 72.0 / ax.figure.dpi
    heights = ax.transData.transform([(x, y) for _, x, y, _ in ends])[:, 1]
    places = _apart([float(height) * scale for height in heights], _GAP)
    edge = float(ax.transAxes.transform((1, 0))[0]) * scale
    for (which, x, y, text), place in zip(ends, places, strict=True):
        start = ax.transData.transform((x, y)) * scale
        label = ax.annotate(
            short(text, 20), (x, y), (edge + 20 - start[0], place - start[1]), textcoords="offset points",
            color=theme.methods[which], fontsize=9.5, fontweight="bold", va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": theme.methods[which], "lw": 0.7, "alpha": 0.6, "shrinkA": 2,
                        "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
        label.set_gid(f"m m{which}")
        if label.arrow_patch is not None:
            label.arrow_patch.set_gid(f"m m{which}")


def _near_labels(ax: Axes, theme: Theme, points: Sequence[tuple[int, float, float, str]], others: np.ndarray) -> None:
    """Labels beside their points: each takes the first of several places that hits no point and no other label."""
    scale = 72.0 / ax.figure.dpi
    at = [ax.transData.transform((x, y)) * scale for _, x, y, _ in points]
    edge = float(ax.transAxes.transform((1, 0))[0]) * scale
    # A label close to the mark of another method would be read as that method's, so a mark counts three times.
    taken = [(x - 10, y - 8, x + 10, y + 8) for x, y in at for _ in range(3)]
    taken += [(x - 3, y - 3, x + 3, y + 3) for x, y in ax.transData.transform(others) * scale]
    for (which, x, y, text), (px, py) in zip(points, at, strict=True):
        text = short(text)
        wide, high = 6.2 * len(text), 12.0
        best, fewest = None, math.inf
        for dx, dy in (
            (11, 0),
            (-11 - wide, 0),
            (-wide / 2, 15),
            (-wide / 2, -15),
            (9, 11),
            (9, -11),
            (11, 22),
            (11, -22),
        ):
            box = (px + dx, py + dy - high / 2, px + dx + wide, py + dy + high / 2)
            hits = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            hits += 3 * (box[2] > edge + 10)
            if hits < fewest:
                best, fewest = (dx, dy, box), hits
        assert best is not None
        taken.append(best[2])
        ax.annotate(text, (x, y), best[:2], textcoords="offset points", color=theme.methods[which], fontsize=9.5,
                    fontweight="bold", va="center", annotation_clip=False, gid=f"m m{which} halo")  # fmt: skip


def _draw_curve(ax: Axes, theme: Theme, inks: Sequence[Ink], which: int, line: Curve, tag: str) -> None:
    colour, gid = theme.methods[which], f"m m{which}"
    if not line.drawable:
        return
    if line.seeds > 1:
        ax.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.16, linewidth=0, gid=gid)
    elif len(line.steps) >= 12:
        ax.plot(line.steps, line.raw, color=colour, linewidth=0.8, alpha=0.28, gid=gid)
    marker = inks[which].marker if len(line.steps) < 4 else None
    ax.plot(line.steps, line.mean, color=colour, linewidth=1.9, marker=marker, markersize=5, gid=gid,
            solid_capstyle="round", solid_joinstyle="round")  # fmt: skip
    last = int(np.flatnonzero(np.isfinite(line.mean))[-1])
    stopped = bool(tag) or last < len(line.mean) - 1
    ax.plot(
        line.steps[last], line.mean[last], color=colour, gid=gid, zorder=4, clip_on=False,
        marker="x" if stopped else inks[which].marker, markersize=7 if stopped else 5,
        markeredgewidth=1.8 if stopped else 0,
    )  # fmt: skip


def _fit(ax: Axes, lows: Sequence[float], highs: Sequence[float], pad: float = 0.06) -> None:
    finite = [value for value in (*lows, *highs) if math.isfinite(value)]
    if finite:
        low, high = min(finite), max(finite)
        room = (high - low) * pad or max(abs(high), 1.0) * 0.05
        ax.set_ylim(low - room, high + room)


def _stop(group: Group, line: Curve) -> str:
    """A word for a curve that ends before its time."""
    if line.mean.size and not np.isfinite(line.mean[-1]):
        return "nan"
    return "" if group.finished else "interrupted"


def _last(line: Curve) -> tuple[float, float]:
    at = int(np.flatnonzero(np.isfinite(line.mean))[-1])
    return float(line.steps[at]), float(line.mean[at])


def _nothing(ax: Axes, theme: Theme, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=theme.muted, fontsize=11)
    ax.set_xticks([])
    ax.set_yticks([])


def _reference(ax: Axes, theme: Theme, baselines: Mapping[str, Any], lines: Sequence[Curve]) -> None:
    low, high = ax.get_ylim()
    ends = [_last(line)[1] for line in lines if line.drawable]
    for name, bits in describe(baselines):
        if low < bits < high:
            ax.axhline(bits, color=theme.muted, linewidth=0.9, dashes=(4, 3), zorder=1)
            # The curves fall: a line near their ends is labelled on the left, where they are far above it.
            left = any(-0.03 < (end - bits) / (high - low) < 0.15 for end in ends)
            ax.annotate(
                f"{short(name)} {bits:.3f}", (0 if left else 1, bits), (3 if left else -3, 3),
                xycoords=("axes fraction", "data"), textcoords="offset points", color=theme.muted, fontsize=8.5,
                ha="left" if left else "right",
            )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- figures


def training_figure(groups: Sequence[Group], inks: Sequence[Ink], baselines: Mapping[str, Any]) -> str:
    """The training loss in the runs' metric: the whole run on the left, its last 60 % on the right."""
    theme, metric = page_theme(1 + max(_places(groups))), _metric(groups)
    with settings("none"):
        fig = Figure(figsize=(WIDTH, 4.3))
        whole = fig.add_axes((0.045, 0.115, 0.30, 0.76))
        close = fig.add_axes((0.405, 0.115, 0.41, 0.76))
        lines = [curve(group.drawn, "loss") for group in groups]
        if not any(line.drawable for line in lines):
            whole.set_position((0.045, 0.115, 0.91, 0.76))
            close.remove()
            style(whole, theme, grid="")
            _nothing(whole, theme, "no training loss in the logs yet")
            return inline(fig, "training", "Training curves: no data yet")
        end = max(float(line.steps[-1]) for line in lines if line.drawable)
        start = 0.4 * end
        for ax in (whole, close):
            style(ax, theme)
            for which, (group, line) in zip(_places(groups), zip(groups, lines, strict=True), strict=True):
                _draw_curve(ax, theme, inks, which, line, _stop(group, line))
                points = [point for point in _evals(group.drawn) if ax is whole or point[0] >= start]
                if points:
                    ax.plot(*zip(*points, strict=True), linestyle="", marker="o", markersize=4.5,
                            markerfacecolor="none", markeredgecolor=theme.methods[which], markeredgewidth=1.2,
                            clip_on=False, gid=f"m m{which}")  # fmt: skip
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
            ax.set_xlabel("training step", fontsize=9)
        whole.set_xlim(0, end)
        raws = [float(v) for line in lines for v in line.raw if np.isfinite(v)]
        ngrams = [bits for _, bits in describe(baselines)]
        if metric.logarithmic and min(raws) > 0:
            whole.set_yscale("log")
            whole.set_ylim(min(raws) / 1.15, max(raws) * 1.15)
            whole.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            whole.yaxis.set_minor_locator(NullLocator())
            whole.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        else:
            _fit(whole, [*raws, *ngrams], [*raws, *ngrams])
        close.set_xlim(start, end)
        seen = [
            float(v)
            for line in lines
            for side in (line.low, line.high, line.mean)
            for v in side[line.steps >= start]
            if np.isfinite(v)
        ] + [v for group in groups for step, v in _evals(group.drawn) if step >= start]
        _fit(close, seen or raws, seen or raws, pad=0.1)
        heading(whole, theme, "Whole run", metric.curve + (", logarithmic" if whole.get_yscale() == "log" else ""))
        heading(close, theme, "From 40 % on", f"{metric.curve}, magnified")
        _reference(whole, theme, baselines, lines)
        _reference(close, theme, baselines, lines)
        ends: list[tuple[int, float, float, str]] = []
        early: list[tuple[int, float, float, str]] = []
        for which, (group, line) in zip(_places(groups), zip(groups, lines, strict=True), strict=True):
            if not line.drawable:
                continue
            x, y = _last(line)
            text = " · ".join(part for part in (group.label, _stop(group, line)) if part)
            (ends if x >= start else early).append((which, x, y, text))
        _end_labels(close, theme, ends)
        for rank, (which, _, _, text) in enumerate(early):
            close.annotate(
                f"× {short(text, 40)}: see left", (0, 0), (8, 8 + rank * _GAP), xycoords="axes fraction",
                textcoords="offset points", color=theme.methods[which], fontsize=9, gid=f"m m{which}",
            )  # fmt: skip
        return inline(fig, "training", f"{capital(metric.curve)} over training steps, one curve per method")


def _metric(groups: Sequence[Group]) -> Quality:
    return common_metric([run for group in groups for run in group.runs])


def _evals(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """Mean in validation over the runs, at each step where it was measured; nothing if curves show something else."""
    at: dict[int, list[float]] = {}
    for run in runs:
        for line in run.evals if run.metric.drawn else ():
            value = line.get(run.metric.key)
            if isinstance(value, (int, float)):
                at.setdefault(int(line["step"]), []).append(float(value))
    means = [(float(step), sum(values) / len(values)) for step, values in sorted(at.items())]
    return [(step, value) for step, value in means if math.isfinite(value)]


def balance_figure(groups: Sequence[Group], inks: Sequence[Ink]) -> str:
    """MaxVio over training, with the share of Sinkhorn calls of the selective methods below."""
    theme = page_theme(1 + max(_places(groups)))
    selective = [(which, group) for which, group in zip(_places(groups), groups, strict=True) if group.selective]
    with settings("none"):
        strip = 0.26 * len(selective) + (0.18 if selective else 0.0)
        height = 4.1 + strip
        fig = Figure(figsize=(WIDTH, height))
        bottom = (0.5 + strip) / height
        ax = fig.add_axes((0.045, bottom, 0.77, 1 - bottom - 0.42 / height))
        _balance_panel(ax, theme, inks, groups, xlabel=not selective)
        if selective and ax.lines:
            low = fig.add_axes((0.045, 0.5 / height, 0.77, (strip - 0.14) / height), sharex=ax)
            style(low, theme, grid="")
            ax.tick_params(labelbottom=False)
            low.set_ylim(len(selective), 0)
            low.set_yticks([])
            low.set_xlabel("training step", fontsize=9)
            shares = [_sinkhorn_share(group.drawn) for _, group in selective]
            most = max((float(share.max()) for _, share in shares if share.size), default=1.0) or 1.0
            for row, ((which, _), (steps, share)) in enumerate(zip(selective, shares, strict=True)):
                if steps.size:
                    edges = np.concatenate([[0.0], steps])
                    low.stairs(row + 0.92 - 0.8 * share / most, edges, baseline=row + 0.92, fill=True, linewidth=0,
                               color=theme.methods[which], alpha=0.85, gid=f"m m{which}")  # fmt: skip
                low.axhline(row + 0.92, color=theme.grid, linewidth=0.7)
            low.annotate(
                f"share of Sinkhorn\n(full bar = {most:.0%})", (1, 0.5), (20, 0),
                xycoords="axes fraction", va="center",
                textcoords="offset points", color=theme.muted, fontsize=8.5, annotation_clip=False,
            )  # fmt: skip
        return inline(fig, "balance", "MaxVio over training steps, one curve per method")


def _balance_panel(
    ax: Axes, theme: Theme, inks: Sequence[Ink], groups: Sequence[Group], *, xlabel: bool, lift: float = 11
) -> None:
    style(ax, theme)
    lines = [curve(group.drawn, "max_vio") for group in groups]
    if not any(line.drawable for line in lines):
        _nothing(ax, theme, "no MaxVio in the logs yet")
        return
    values = np.concatenate([side[np.isfinite(side)] for line in lines for side in (line.mean, line.low, line.high)])
    # Methods that differ by more than a factor of 20 cannot be read on one linear axis.
    log = bool(values.min() > 0 and values.max() / values.min() > 20)
    for which, (group, line) in zip(_places(groups), zip(groups, lines, strict=True), strict=True):
        _draw_curve(ax, theme, inks, which, line, _stop(group, line))
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(
            FixedLocator([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50])
        )
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_ylim(values.min() / 1.15, values.max() * 1.15)
    else:
        ax.set_ylim(min(0.0, float(values.min())), float(values.max()) * 1.06 or 1.0)
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.set_xlim(0, max(float(line.steps[-1]) for line in lines if line.drawable))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if xlabel:
        ax.set_xlabel("training step", fontsize=9)
    heading(ax, theme, "MaxVio", "mean over layers" + (", logarithmic" if log else "") + "; 0 = perfectly even", lift)
    ends = []
    for which, (group, line) in zip(_places(groups), zip(groups, lines, strict=True), strict=True):
        if line.drawable:
            x, y = _last(line)
            ends.append((which, x, y, " · ".join(part for part in (group.label, _stop(group, line)) if part)))
    _end_labels(ax, theme, ends)


def _load_rgba(relative: np.ndarray) -> np.ndarray:
    """Colours of loads relative to uniform: clear at 1, blue towards 0, orange towards 3 and beyond."""
    value = np.clip(np.nan_to_num(relative, nan=1.0), 0.0, _CLIP)
    off = np.where(value < 1, 1 - value, (value - 1) / (_CLIP - 1))
    out = np.empty((*value.shape, 4))
    out[..., :3] = np.where((value < 1)[..., None], to_rgb(UNDER), to_rgb(OVER))
    out[..., 3] = off**0.8
    return out


def experts_figure(groups: Sequence[Group], inks: Sequence[Ink]) -> str:
    """Load per expert over training: a row of panels per method (its first seed), a panel per layer."""
    theme = page_theme(1 + max(_places(groups)))
    runs = [(which, group, group.runs[0]) for which, group in zip(_places(groups), groups, strict=True)]
    histories = {which: load_history(run) for which, _, run in runs}
    layers = max((loads.shape[1] for _, loads in histories.values() if loads.size), default=0)
    across = min(max(layers, 1), 6)
    deep = max(1, math.ceil(layers / across))
    with settings("none"):
        rows = len(groups) * deep
        top, each, foot = 0.74, 0.74, 0.42
        height = top + rows * each + foot
        fig = Figure(figsize=(WIDTH, height))
        left, width = 0.155, 0.835
        wide = width / across
        last = max((float(edges[-1]) for edges, loads in histories.values() if loads.size), default=1.0)
        for row, (which, group, run) in enumerate(runs):
            edges, loads = histories[which]
            for layer in range(max(layers, 1)):
                line, column = row * deep + layer // across, layer % across
                y = (foot + (rows - 1 - line) * each + 0.08) / height
                ax = fig.add_axes((left + column * wide, y, wide - 0.012, (each - 0.14) / height))
                ax.set_facecolor("none")
                ax.tick_params(length=0, colors=theme.muted, labelsize=8.5, pad=3)
                for spine in ax.spines.values():
                    spine.set_color(theme.grid)
                    spine.set_linewidth(0.8)
                ax.set_yticks([])
                ax.set_xlim(0, last)
                ax.set_xticks([0, last])
                ax.set_xticklabels(["0", f"{last:.0f}"])
                first, final = ax.get_xticklabels()
                first.set_horizontalalignment("left")
                final.set_horizontalalignment("right")
                if line < rows - 1:
                    ax.tick_params(labelbottom=False)
                if not loads.size or layer >= loads.shape[1]:
                    ax.text(0.5, 0.5, "no load logged", transform=ax.transAxes, ha="center", va="center",
                            color=theme.muted, fontsize=8.5)  # fmt: skip
                    continue
                ax.imshow(_load_rgba(_columns(edges, loads[:, layer])), extent=(0, float(edges[-1]), 0, loads.shape[2]),
                          aspect="auto", interpolation="none", origin="upper")  # fmt: skip
                ax.set_xlim(0, last)
                if edges[-1] < last:  # what was never trained must not look balanced
                    ax.axvspan(float(edges[-1]), last, color=theme.grid, linewidth=0)
                if loads.shape[2] <= 16:
                    for expert in range(1, loads.shape[2]):
                        ax.axhline(expert, color=theme.grid, linewidth=0.35)
            y = (foot + (rows - deep * row - 0.5) * each) / height
            fig.text(left - 0.014, y + 0.005, short(group.label, 20), ha="right", va="bottom", fontweight="bold",
                     color=theme.methods[which], fontsize=10, gid=f"m m{which}")  # fmt: skip
            tag = f"seed {run.seed}" + ("" if run.finished else ", interrupted")
            fig.text(left - 0.014, y - 0.002, tag, ha="right", va="top", color=theme.muted, fontsize=8.5)
        for column in range(across if layers else 0):
            label = f"layer {column + 1}" if deep == 1 else f"layers {column + 1}, {column + 1 + across}, …"
            fig.text(left + column * wide, 1 - (top - 0.08) / height, label, color=theme.muted, fontsize=9, va="bottom")
        fig.text(left + width - 0.012, 0.1 / height, "training step", color=theme.muted, fontsize=9, ha="right")
        _scale(fig, theme, (left + width - 0.312, 1 - 0.21 / height, 0.3, 0.11 / height))
        return inline(fig, "experts", "Heat maps of the load of each expert over training, per method and layer")


def _columns(edges: np.ndarray, loads: np.ndarray, most: int = 240) -> np.ndarray:
    """Loads of shape (N, E) as an image (E, columns) on a regular grid of steps, so that log lines keep their width."""
    n = len(loads)
    regular = np.allclose(np.diff(edges), edges[1] - edges[0])
    count = n if regular and n <= most else min(most, max(2 * n, 60))
    centres = (np.arange(count) + 0.5) / count * edges[-1]
    which = np.clip(np.searchsorted(edges[1:], centres), 0, n - 1)
    return loads[which].T


def _scale(fig: Figure, theme: Theme, place: tuple[float, float, float, float]) -> None:
    ax = fig.add_axes(place)
    ax.imshow(
        _load_rgba(np.linspace(0, _CLIP, 121)[None]), extent=(0, _CLIP, 0, 1), aspect="auto", interpolation="none"
    )
    ax.set_yticks([])
    ax.set_xticks([0, 1, 2, 3], ["0 idle", "1 fair share", "2", "≥ 3"])
    ax.tick_params(length=0, colors=theme.muted, labelsize=8.5, pad=3)
    for spine in ax.spines.values():
        spine.set_color(theme.grid)
        spine.set_linewidth(0.8)


def serving_figure(groups: Sequence[Group], inks: Sequence[Ink]) -> str:
    """Serving load per expert, sorted within each layer: a row per method, a panel per layer."""
    theme = page_theme(1 + max(_places(groups)))
    loads: dict[int, np.ndarray] = {}
    labels = {group.place: group.label for group in groups}
    for which, group in zip(_places(groups), groups, strict=True):
        for run in group.finished[:1]:
            try:
                load = np.asarray(((run.result or {}).get("serving") or {}).get("load"), dtype=float)
            except (TypeError, ValueError):
                continue
            if load.ndim == 2 and load.size:
                loads[which] = _relative(load)
    with settings("none"):
        if not loads:
            fig = Figure(figsize=(WIDTH, 1.6))
            ax = fig.add_axes((0.045, 0.1, 0.91, 0.8))
            style(ax, theme, grid="")
            _nothing(ax, theme, "no serving loads yet: they are measured when a run finishes")
            return inline(fig, "serving", "Serving loads: no data yet")
        layers = max(load.shape[0] for load in loads.values())
        across = min(layers, 6)
        deep = math.ceil(layers / across)
        rows = len(loads) * deep
        top, each, foot = 0.36, 0.78 if deep == 1 else 0.95, 0.3
        height = top + rows * each + foot
        fig = Figure(figsize=(WIDTH, height))
        left, width = 0.155, 0.835
        wide = width / across
        peak = max(float(np.nanmax(load, initial=1.0)) for load in loads.values()) * 1.04
        for row, (which, load) in enumerate(loads.items()):
            for layer in range(load.shape[0]):
                line, column = row * deep + layer // across, layer % across
                y = (foot + (rows - 1 - line) * each + 0.1) / height
                ax = fig.add_axes(
                    (left + column * wide, y, wide - 0.016, (each - (0.16 if deep == 1 else 0.33)) / height)
                )
                style(ax, theme, grid="")
                ax.set_yticks([])
                ax.set_xticks([])
                bars = np.sort(np.nan_to_num(load[layer]))[::-1]
                place = np.arange(len(bars))
                ax.bar(place, bars, width=0.8, color=theme.methods[which], alpha=0.9, gid=f"m m{which}")
                ax.axhline(1, color=theme.muted, linewidth=0.9, dashes=(3, 2.5))
                idle = place[bars < 0.01]
                if idle.size:
                    ax.plot(
                        idle, np.full(len(idle), 0.12 * peak), "x", color=theme.ink, markersize=4.5, markeredgewidth=1.2
                    )
                ax.set_xlim(-0.7, len(bars) - 0.3)
                ax.set_ylim(0, peak)
                ax.annotate(
                    f"max {bars[0]:.2f}×", (1, 1), (0, -1), xycoords="axes fraction", textcoords="offset points",
                    ha="right", va="top", color=theme.muted, fontsize=8,
                )  # fmt: skip
                if row == 0 or deep > 1:
                    ax.set_title(f"layer {layer + 1}", loc="left", color=theme.muted, fontsize=9, pad=6)
            y = (foot + (rows - deep * row - 0.5) * each) / height
            fig.text(left - 0.014, y, short(labels[which], 20), ha="right", va="center", fontweight="bold",
                     color=theme.methods[which], fontsize=10, gid=f"m m{which}")  # fmt: skip
        fig.text(left, 0.06 / height, "experts, busiest first", color=theme.muted, fontsize=9)
        fig.text(left + width - 0.016, 0.06 / height, "dashed line = fair share · cross = dead expert", ha="right",
                 color=theme.muted, fontsize=9)  # fmt: skip
        return inline(fig, "serving", "Bars of the load of each expert in serving, per method and layer")


def scatter_figure(groups: Sequence[Group], inks: Sequence[Ink]) -> str:
    """The metric in validation against serving MaxVio: a large mark per method, a small one per seed."""
    theme, metric = page_theme(1 + max(_places(groups))), _metric(groups)
    clouds = []
    for which, group in zip(_places(groups), groups, strict=True):
        pairs = [
            (vio, quality)
            for run in group.finished
            if (vio := run.value("serving", "max_vio")) is not None
            and (quality := run.quality) is not None
            and math.isfinite(vio)
            and math.isfinite(quality)
        ]
        if pairs:
            clouds.append((which, group, np.array(pairs)))
    with settings("none"):
        fig = Figure(figsize=(WIDTH, 4.0 if clouds else 1.6))
        ax = fig.add_axes((0.06, 0.125, 0.915, 0.77) if clouds else (0.045, 0.1, 0.91, 0.8))
        style(ax, theme, grid="both" if clouds else "")
        if not clouds:
            _nothing(ax, theme, "no finished run to place yet")
            return inline(fig, "scatter", "Quality against balance: no data yet")
        everything = np.concatenate([points for _, _, points in clouds])
        right = float(everything[:, 0].max()) * 1.12 or 1.0
        ax.set_xlim(0, right)
        _fit(ax, everything[:, 1].tolist(), [], pad=0.2)
        ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        ax.set_xlabel("MaxVio in serving (smaller is more even)", fontsize=9)
        heading(ax, theme, f"Validation {metric.title}", "(smaller is better), axis does not start at 0")
        ends = []
        for which, group, points in clouds:
            colour, gid = theme.methods[which], f"m m{which}"
            x, y = points.mean(axis=0)
            if len(points) > 1:
                for px, py in points:
                    ax.plot([x, px], [y, py], color=colour, linewidth=0.8, alpha=0.45, gid=gid)
                ax.plot(points[:, 0], points[:, 1], linestyle="", marker=inks[which].marker, markersize=4.5, alpha=0.55,
                        color=colour, markeredgewidth=0, gid=gid)  # fmt: skip
            ax.plot([x], [y], marker=inks[which].marker, markersize=11, color=colour, markeredgewidth=0, gid=gid)
            ends.append((which, float(x), float(y), group.label))
        _near_labels(ax, theme, ends, everything)
        ax.annotate(
            "better", (0, 0), (34, 30), xycoords="axes fraction", textcoords="offset points", color=theme.muted,
            fontsize=9, arrowprops={"arrowstyle": "-|>", "color": theme.muted, "lw": 1.0, "shrinkB": 6},
        )  # fmt: skip
        return inline(fig, "scatter", f"Validation {metric.title} against serving MaxVio")


def standing_figure(groups: Sequence[Group], inks: Sequence[Ink], baselines: Mapping[str, Any]) -> str:
    """The metric in validation, one line per method."""
    theme = page_theme(1 + max(_places(groups)))
    with settings("none"):
        fig = Figure(figsize=(WIDTH, 0.85 + 0.4 * max(len(groups), 2)))
        height = fig.get_figheight()
        ax = fig.add_axes((0.17, 0.36 / height, 0.72, 1 - 0.76 / height))
        _standing_panel(ax, theme, inks, groups, baselines)
        return inline(fig, "standing", f"Validation {_metric(groups).title} of each method")


def _standing_panel(
    ax: Axes, theme: Theme, inks: Sequence[Ink], groups: Sequence[Group], baselines: Mapping[str, Any]
) -> None:
    metric = _metric(groups)
    style(ax, theme, grid="x")
    ax.spines["bottom"].set_visible(False)
    ax.set_ylim(len(groups) - 0.5, -0.55)
    ax.set_yticks(range(len(groups)), [short(group.label, 20) for group in groups])
    for which, tick in zip(_places(groups), ax.get_yticklabels(), strict=True):
        tick.set_color(theme.methods[which])
        tick.set_fontweight("bold")
        tick.set_fontsize(10)
        tick.set_gid(f"m m{which}")
    values = [group.qualities for group in groups]
    spreads = [Spread.of(found) if found else None for found in values]
    finite = [v for found in values for v in found if math.isfinite(v)]
    finite += [
        spread.mean + sign * spread.half for spread in spreads if spread and spread.half is not None for sign in (-1, 1)
    ]
    ngrams = describe(baselines)
    if finite:
        low, high = min(finite), max(finite)
        room = max(high - low, 0.02)
        # A reference far away would squeeze the methods into one dot: it is then only announced at the edge.
        near = [bits for _, bits in ngrams if low - 1.2 * room <= bits <= high + 1.2 * room]
        low, high = min([low, *near]), max([high, *near])
        ax.set_xlim(low - 0.12 * (high - low or room), high + 0.12 * (high - low or room))
    elif ngrams:
        ax.set_xlim(min(bits for _, bits in ngrams) - 0.2, max(bits for _, bits in ngrams) + 0.2)
    else:
        ax.set_xlim(0, 8)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    left, right = ax.get_xlim()
    off: dict[str, list[str]] = {"left": [], "right": []}
    across = blended_transform_factory(ax.transData, ax.transAxes)
    for name, bits in ngrams:
        if left <= bits <= right:
            ax.axvline(bits, color=theme.muted, linewidth=0.9, dashes=(4, 3), zorder=1)
            ax.text(bits, 1.015, f"{short(name)} {bits:.3f}", transform=across, ha="center", va="bottom",
                    color=theme.muted, fontsize=8.5)  # fmt: skip
        else:
            off["left" if bits < left else "right"].append(f"{short(name)} {bits:.3f}")
    rise = 3 if sum(map(len, off.values())) == len(ngrams) else 15  # above the names of the dashed lines
    if off["left"]:
        ax.annotate("← " + ", ".join(off["left"]), (0, 1), (0, rise), xycoords="axes fraction",
                    textcoords="offset points", color=theme.muted, fontsize=8.5)  # fmt: skip
    if off["right"]:
        ax.annotate(", ".join(off["right"]) + " →", (1, 1), (0, rise), xycoords="axes fraction",
                    textcoords="offset points", color=theme.muted, fontsize=8.5, ha="right")  # fmt: skip
    for row, (which, found, spread) in enumerate(zip(_places(groups), values, spreads, strict=True)):
        colour, gid = theme.methods[which], f"m m{which}"
        if spread is None or not math.isfinite(spread.mean):
            text = "not finished" if spread is None else f"diverged ({spread.text(metric.digits)})"
            ax.annotate(text, (0, row), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                        color=theme.muted, fontsize=9, va="center", style="italic")  # fmt: skip
            continue
        if spread.half is not None:
            ax.plot([spread.mean - spread.half, spread.mean + spread.half], [row, row], color=colour, linewidth=5,
                    alpha=0.28, solid_capstyle="round", gid=gid)  # fmt: skip
        if len(found) > 1:
            ax.plot(found, [row] * len(found), linestyle="", marker="o", markersize=4, color=colour, alpha=0.7,
                    markeredgewidth=0, gid=gid)  # fmt: skip
        ax.plot(
            [spread.mean], [row], marker=inks[which].marker, markersize=10, color=colour, markeredgewidth=0, gid=gid
        )
        ax.annotate(
            metric.text(spread.mean), (1, row), (12, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", color=theme.ink, fontsize=10, va="center", annotation_clip=False, gid=gid,
        )  # fmt: skip


def picture(groups: Sequence[Group], inks: Sequence[Ink], baselines: Mapping[str, Any], path: Path) -> None:
    """Write the picture of the README: the metric in validation on the left, MaxVio over training on the right."""
    theme = paper_theme(inks)
    svg = path.suffix.lower() == ".svg"
    with settings("path"):
        height = max(3.7, 1.3 + 0.42 * len(groups))
        fig = Figure(figsize=(12.2, height), facecolor="#fdfdfb", dpi=170)
        (FigureCanvasSVG if svg else FigureCanvasAgg)(fig)
        left = fig.add_axes((0.125, 0.15, 0.305, 0.66))
        right = fig.add_axes((0.545, 0.15, 0.31, 0.66))
        _standing_panel(left, theme, inks, groups, baselines)
        heading(left, theme, f"Validation {_metric(groups).title}", "lower is better", lift=25)
        _balance_panel(right, theme, inks, groups, xlabel=True, lift=25)
        with path.open("wb") as file:
            if svg:
                fig.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
            else:
                fig.savefig(file, format="png", metadata={"Software": None})
