"""The load of every expert: heat maps over training, bars in serving; a row of panels a method, a panel a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sinkroute.lab.page.drawing import WIDTH, Theme, inline, page_theme, settings, short, style
from sinkroute.lab.page.loads import LEAST_TOP, rgba, ticks
from sinkroute.lab.page.palette import Ink
from sinkroute.lab.study.figures.history import load_history, relative
from sinkroute.lab.study.figures.marks import muted, no_data
from sinkroute.lab.study.runs import Group, Run
from sinkroute.routing.metrics import DEAD

__all__ = ["experts_figure", "serving_figure"]

_ACROSS = 6  # panels in a row
_TOP, _FOOT = 0.74, 0.46  # inches


def experts_figure(groups: Sequence[Group], inks: Sequence[Ink]) -> str:
    """Load per expert over training, of the first run of each method."""
    theme = page_theme(len(inks))
    found = [(group, group.runs[0], *load_history(group.runs[0])) for group in groups]
    layers = max((loads.shape[1] for *_, loads in found if loads.size), default=1)
    last = max((float(edges[-1]) for _, _, edges, loads in found if loads.size), default=1.0)
    top = max(LEAST_TOP, *(float(np.nanmax(loads, initial=1.0)) for *_, loads in found))
    with settings("none"):
        fig, panels = _panels([(group, _about(run)) for group, run, *_ in found], layers, theme)
        for (_, _, edges, loads), row in zip(found, panels, strict=True):
            for layer, ax in enumerate(row):
                _frame(ax, theme)
                ax.set_xlim(0, last)
                if not loads.size or layer >= loads.shape[1]:
                    muted(ax, theme, "no load logged", (0.5, 0.5), (0, 0), ha="center", va="center")
                    continue
                _, _, experts = loads.shape
                ax.imshow(rgba(_columns(edges, loads[:, layer]), top), extent=(0, float(edges[-1]), 0, experts),
                          aspect="auto", interpolation="none", origin="upper")  # fmt: skip
                ax.set_xlim(0, last)
                if edges[-1] < last:  # what was never trained must not look balanced
                    ax.axvspan(float(edges[-1]), last, color=theme.grid, linewidth=0)
                for expert in range(1, experts if experts <= 16 else 0):
                    ax.axhline(expert, color=theme.grid, linewidth=0.35)
        for ax in panels[-1][-_ACROSS:]:
            ax.set_xticks([0, last], ["0", f"{last:.0f}"])
            first, final = ax.get_xticklabels()
            first.set_horizontalalignment("left")
            final.set_horizontalalignment("right")
        tall = fig.get_figheight()
        fig.text(0.175, 0.1 / tall, "across: training step · down: experts, a line each", color=theme.muted, fontsize=9)
        scale = fig.add_axes((0.565, 1 - 0.21 / tall, 0.4, 0.11 / tall))
        places = np.linspace(0, 1, 201)
        shown = np.where(places < 0.5, 2 * places, top ** (2 * places - 1))
        scale.imshow(rgba(shown[None], top), extent=(0, 1, 0, 1), aspect="auto", interpolation="none")
        _frame(scale, theme)
        marks = ticks(top)
        scale.set_xticks([place for place, _ in marks], [name for _, name in marks])
        return inline(fig, "experts", "Heat maps of the load of each expert over training, per method and layer")


def serving_figure(groups: Sequence[Group], inks: Sequence[Ink]) -> str:
    """Serving load per expert, sorted within each layer, of the first finished run of each method."""
    theme = page_theme(len(inks))
    first = [(group, group.finished[0].result or {}) for group in groups if group.finished]
    told = [(group, relative((result.get("serving") or {}).get("load"))) for group, result in first]
    found = [(group, load) for group, load in told if load is not None]
    with settings("none"):
        if not found:
            return no_data("serving", theme, "no serving loads yet: they are measured when a run finishes")
        layers = max(len(load) for _, load in found)
        peak = max(float(np.nanmax(load, initial=1.0)) for _, load in found) * 1.04
        fig, panels = _panels([(group, "") for group, _ in found], layers, theme)
        for (group, load), row in zip(found, panels, strict=True):
            for layer, ax in enumerate(row[: len(load)]):
                style(ax, theme, grid="")
                bars = np.sort(np.nan_to_num(load[layer]))[::-1]
                place = np.arange(len(bars))
                ax.bar(place, bars, color=theme.methods[group.place], alpha=0.9, gid=f"m m{group.place}")
                ax.axhline(1, color=theme.muted, linewidth=0.9, dashes=(3, 2.5))
                dead = place[bars < DEAD]
                ax.plot(dead, np.full(len(dead), 0.12 * peak), "x", color=theme.ink, markersize=4.5)
                ax.set(xlim=(-0.7, len(bars) - 0.3), ylim=(0, peak), xticks=[], yticks=[])
                muted(ax, theme, f"max {bars[0]:.2f}×", (1, 1), (0, -1), ha="right", va="top")
            for ax in row[len(load) :]:
                ax.remove()
        about = "across: experts, busiest first · up: load · dashed: a fair share · ×: dead"
        fig.text(0.175, 0.1 / fig.get_figheight(), about, color=theme.muted, fontsize=9)
        return inline(fig, "serving", "Bars of the load of each expert in serving, per method and layer")


def _panels(named: Sequence[tuple[Group, str]], layers: int, theme: Theme) -> tuple[Figure, list[list[Axes]]]:
    """Axes for each group and layer, with the names of both; `named` adds words below a group's name."""
    across = min(layers, _ACROSS)
    deep = math.ceil(layers / across)
    lines, each = len(named) * deep, 0.78 if deep == 1 else 0.98
    height = _TOP + lines * each + _FOOT
    fig = Figure(figsize=(WIDTH, height))
    where = {"left": 0.175, "right": 0.985, "bottom": _FOOT / height, "top": 1 - _TOP / height}
    where |= {"wspace": 0.1, "hspace": 0.24 if deep == 1 else 0.58}
    grid = fig.subplots(lines, across, squeeze=False, gridspec_kw=where)
    panels = [list(grid[row * deep : (row + 1) * deep].flat) for row in range(len(named))]
    for row, ((group, more), axes) in enumerate(zip(named, panels, strict=True)):
        muted(axes[0], theme, short(group.label, 18) + "\n" * bool(more), (0, 0.5), (-10, 0), ha="right", va="center",
              color=theme.words[group.place], fontsize=10, fontweight="bold", gid=f"m m{group.place}")  # fmt: skip
        muted(axes[0], theme, "\n" * bool(more) + more, (0, 0.5), (-10, 0), ha="right", va="center")
        for layer, ax in enumerate(axes):
            if layer >= layers:
                ax.remove()
            elif deep > 1 or row == 0:
                ax.set_title(f"layer {layer + 1}", loc="left", color=theme.muted, fontsize=9, pad=5)
    return fig, [axes[:layers] for axes in panels]


def _frame(ax: Axes, theme: Theme) -> None:
    ax.set_facecolor("none")
    ax.tick_params(length=0, colors=theme.muted, labelsize=9, pad=3)
    for spine in ax.spines.values():
        spine.set(color=theme.grid, linewidth=0.8)
    ax.set(xticks=[], yticks=[])


def _about(run: Run) -> str:
    return f"seed {run.seed}" + ("" if run.finished else ", interrupted")


def _columns(edges: np.ndarray, loads: np.ndarray, most: int = 240) -> np.ndarray:
    """Loads of shape (N, E) as an image (E, columns) on a regular grid of steps, so that log lines keep their width."""
    n = len(loads)
    regular = np.allclose(np.diff(edges), edges[1] - edges[0])
    count = n if regular and n <= most else min(most, max(2 * n, 60))
    centres = (np.arange(count) + 0.5) / count * edges[-1]
    return loads[np.clip(np.searchsorted(edges[1:], centres), 0, n - 1)].T
