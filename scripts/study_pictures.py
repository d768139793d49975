"""The pictures of docs/study.md, drawn from the collected results: one for each of its questions.

    python scripts/study_pictures.py        # benchmarks/results/study/*.json -> docs/pictures/study-*.svg

The same results give the same bytes; a test holds pictures and results together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sinkroute.lab.page.drawing import Theme, heading, paper_theme, settings, style
from sinkroute.lab.study.statistics import Estimate

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "study"
PICTURES = ROOT / "docs" / "pictures"

LEFT = 0.245  # where the axes of a picture begin, as a share of its width
BALANCED, UNEVEN = "#0072b2", "#c24e00"
THEME = paper_theme(())
# A mean MaxVio when serving below it counts as even: the busiest expert has less than twice its share.
EVEN = 1.0
WORDS = "valid.bits_per_symbol"
MANY, ONE = "64 top-2", "16 top-1"  # of study/collapse
# The paper's gains in bits: its least and its largest per byte, and, a thousandth wide for the eye, the one
# per word whose perplexities are known (34.607 to 34.056).
ENWIK8, WIKITEXT = (-0.039, -0.023), (-0.0236, -0.0226)


@dataclass(frozen=True)
class Row:
    """A line of a picture: a mean with half of its interval, and whether the method serves evenly."""

    name: str
    mean: float
    half: float
    even: bool


def seeds(study: str, method: str, metric: str, size: str = "") -> dict[str, float]:
    """Seed → value of a metric, from a study's collected results."""
    for found in json.loads((RESULTS / f"{study}.json").read_text(encoding="utf-8"))["statistics"]:
        if (found["size"], found["method"], found["metric"]) == (size, method, metric):
            return dict(found["seeds"])
    raise KeyError(f"{study} has no {metric} of {method} at {size!r}")


def against(study: str, method: str, size: str = "", metric: str = "valid.bits_per_byte") -> Row:
    """A method against vanilla in a study, seed by seed; perplexity by its logarithm to the base 2, in bits."""
    own, other = seeds(study, method, metric, size), seeds(study, "vanilla", metric, size)
    scale: Callable[[float], float] = math.log2 if metric.endswith("perplexity") else float
    found = Estimate.of([scale(own[seed]) - scale(other[seed]) for seed in other if seed in own])
    assert found.half is not None
    served = seeds(study, method, "serving.max_vio", size)
    return Row(method, found.mean, found.half, sum(served.values()) / len(served) < EVEN)


def draw_rows(ax: Axes, rows: Sequence[Row], theme: Theme, digits: int = 3, sign: bool = True) -> None:
    """Means with intervals, the first row on top, numbers at the right."""
    for place, row in enumerate(reversed(rows)):
        colour = BALANCED if row.even else UNEVEN
        ax.plot([row.mean - row.half, row.mean + row.half], [place, place], color=colour, linewidth=2, alpha=0.45)
        ax.plot([row.mean], [place], "o" if row.even else "X", color=colour, markersize=7)
        text = f"{row.mean:{'+' if sign else ''}.{digits}f} ± {row.half:.{digits}f}"
        say(ax, theme, place, text)
    ax.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    style(ax, theme, grid="x")
    ax.tick_params(axis="y", colors=theme.ink, labelsize=9.5)


def say(ax: Axes, theme: Theme, place: float, text: str) -> None:
    """Words at the right of a row."""
    ax.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), color=theme.ink, fontsize=9, va="center")


def picture(name: str, rows: int, draw: Callable[[Axes, Theme], None], right: float = 0.82) -> Path:
    """Draw one, and write it: names stand at its left, and what is right of `right` is for numbers."""
    with settings("none"):
        height = 0.27 * rows + 1.15
        figure = Figure(figsize=(8.4, height), facecolor="white")
        ax = figure.add_axes((LEFT, 0.62 / height, right - LEFT, 1 - 1.05 / height))
        draw(ax, THEME)
        path = PICTURES / f"study-{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
    return path


def balance_helps() -> Path:
    methods = ("load-balance", "loss-free", "quantile", "sinkhorn", "ssr-l", "ssr-s", "z-loss")
    rows = [against("paper-lm", method) for method in methods]
    rows += [renamed(against("dual", "ssr-dual"), "ssr-dual (other seeds)")]
    rows += [renamed(against("rates", "ssr-dual", "0.006"), "ssr-dual (again other seeds)")]
    rows += [renamed(against("words", method, metric=WORDS), f"{method}, words") for method in ("ssr-dual", "ssr-l")]
    rows += [renamed(against("words", "quantile ema 0.9", metric=WORDS), "quantile, words")]
    rows += [renamed(against("collapse", method, MANY), f"{method}, 64 experts") for method in ("ssr-dual", "ssr-l")]
    rows += [renamed(against("length", "ssr-dual"), "ssr-dual, 16 times as long")]
    rows += [renamed(against("capacity", method, "1.0"), f"{method}, capacity 1.0") for method in ("ssr-dual", "ssr-l")]
    for method in ("load-balance", "ssr-dual", "quantile ema 0.9", "loss-free"):
        rows += [renamed(against("collapse", method, ONE), f"{method.split()[0]}, one choice")]
    rows.sort(key=lambda row: row.mean)

    def draw(ax: Axes, theme: Theme) -> None:
        ax.axvline(0, color=theme.muted, linewidth=1)
        draw_rows(ax, rows, theme)
        heading(ax, theme, "Loss against vanilla", "bits per byte or word; lower is better; ● serves evenly, ✕ not")
        ax.set_xlabel("difference to vanilla, mean and 95 % interval over seeds", fontsize=9)

    return picture("balance-helps", len(rows), draw)


def ssr_balances() -> Path:
    rows = []
    for study, methods in {
        "paper-lm": ("vanilla", "ssr-l", "ssr-s", "load-balance", "loss-free"),
        "dual": ("quantile ema 0.9", "ssr-dual"),
        "words": ("vanilla", "ssr-l", "ssr-dual"),
        "collapse": ("vanilla", "ssr-l", "ssr-dual"),
    }.items():
        for method in methods:
            size = MANY if study == "collapse" else ""
            found = Estimate.of(list(seeds(study, method, "serving.max_vio", size).values()))
            assert found.half is not None
            name = method + {"words": ", words", "collapse": ", 64 experts"}.get(study, "")
            rows.append(Row(name, found.mean, found.half, found.mean < EVEN))

    def draw(ax: Axes, theme: Theme) -> None:
        draw_rows(ax, rows, theme, digits=2, sign=False)
        ax.set_xlim(left=0)
        heading(ax, theme, "How uneven experts are used when serving", "MaxVio; 0 is even")
        ax.set_xlabel("MaxVio, mean and 95 % interval over 10 seeds; words: 24; 64 experts: 16", fontsize=9)

    return picture("ssr-balances", len(rows), draw)


def ssr_alone() -> Path:
    rows = [
        renamed(against("paper-lm", "ssr-l"), "ssr-l, bytes (10 seeds)"),
        renamed(against("paper-lm", "ssr-s"), "ssr-s, bytes (10)"),
        renamed(against("rates", "ssr-l", "0.003"), "ssr-l, half the rate (8)"),
        renamed(against("rates", "ssr-l", "0.006"), "ssr-l, the rate again (8)"),
        renamed(against("rates", "ssr-l", "0.012"), "ssr-l, twice the rate (8)"),
        renamed(against("longer", "ssr-l"), "ssr-l, four times as long (3)"),
        renamed(against("length", "ssr-l"), "ssr-l, 16 times as long (4)"),
        renamed(against("capacity", "ssr-l", "1.0"), "ssr-l, capacity 1.0 (10)"),
        renamed(against("capacity", "ssr-l", "1.25"), "ssr-l, capacity 1.25 (10)"),
        renamed(against("collapse", "ssr-l", MANY), "ssr-l, 64 experts top-2 (16)"),
        renamed(against("collapse", "ssr-l", ONE), "ssr-l, 16 experts top-1 (16)"),
        renamed(against("words", "ssr-l", metric=WORDS), "ssr-l, words (24)"),
        renamed(against("words-more", "ssr-l", metric=WORDS), "ssr-l, words (12 more)"),
        renamed(against("words", "ssr-l literal", metric=WORDS), "ssr-l literal, words (24)"),
    ]

    def draw(ax: Axes, theme: Theme) -> None:
        words = sum("words" in row.name for row in rows)  # they stand below
        for (low, high), bottom, top in ((ENWIK8, words, len(rows)), (WIKITEXT, 0, words)):
            ax.fill_betweenx([bottom - 0.5, top - 0.5], low, high, color=theme.grid, linewidth=0)
        ax.axvline(0, color=theme.muted, linewidth=1)
        draw_rows(ax, rows, theme)
        heading(ax, theme, "SSR's loss against vanilla", "bits; lower is better; grey: the gains the paper reports")
        ax.set_xlabel("difference to vanilla, mean and 95 % interval over seeds", fontsize=9)

    return picture("ssr-alone", len(rows), draw)


def cost() -> Path:
    base = seeds("overhead", "vanilla", "train.ms_per_step")
    methods = (
        "load-balance",
        "loss-free",
        "quantile",
        "ssr-l p=0.001",
        "ssr-s p=0.001",
        "ssr-bias",
        "sinkhorn",
        "noisy",
    )
    times = {method: seeds("overhead", method, "train.ms_per_step") for method in methods}

    def draw(ax: Axes, theme: Theme) -> None:
        ax.axvline(1, color=theme.muted, linewidth=1)
        middle = median(base.values())
        for place, method in enumerate(reversed(methods)):
            ratios = [value / middle for value in times[method].values()]
            ax.plot(ratios, [place] * len(ratios), "o", color=theme.muted, markersize=4, alpha=0.6)
            ax.plot([median(ratios)], [place], "D", color=BALANCED, markersize=7)
            told = f"{median(ratios):.2f}"
            ax.annotate(
                told, (1.01, place), xycoords=("axes fraction", "data"), color=theme.ink, fontsize=9, va="center"
            )
        ax.set_yticks(range(len(methods)), list(reversed(methods)))
        ax.set_ylim(-0.7, len(methods) - 0.3)
        style(ax, theme, grid="x")
        ax.tick_params(axis="y", colors=theme.ink, labelsize=9.5)
        heading(ax, theme, "Time of a training step", "relative to vanilla's median; a busy machine")
        ax.set_xlabel("three repeats (dots) and their median (diamond)", fontsize=9)

    return picture("cost", len(methods), draw)


# What each column shows: its heading, study, size, metric, digits.
WHEN = (
    ("dead experts of 128,\n64 in a layer, top-2", "collapse", MANY, "serving.dead", 1),
    ("MaxVio, served,\n16 experts, top-1", "collapse", ONE, "serving.max_vio", 2),
    ("share dropped,\ncapacity 1.0", "capacity", "1.0", "train.dropped", 3),
    ("share dropped,\ncapacity 1.25", "capacity", "1.25", "train.dropped", 3),
    ("steps to balance,\ntext turns to code", "shift", "text to code", "switch.steps_to_balance", 0),
)


def which_when() -> Path:
    """What methods leave uneven: a table in colours, in each column blue up to half of its worst mean."""
    methods = ("vanilla", "ssr-l", "load-balance", "loss-free", "quantile ema 0.9", "ssr-dual", "ssr-dual exact")

    def draw(ax: Axes, theme: Theme) -> None:
        for column, (_, study, size, metric, digits) in enumerate(WHEN):
            found = {}
            for place, method in enumerate(reversed(methods)):
                with suppress(KeyError):  # not every study has every method
                    found[place] = Estimate.of(list(seeds(study, method, metric, size).values()))
            worst = max(estimate.mean for estimate in found.values())
            for place, estimate in found.items():
                share = estimate.mean / worst
                colour, strength = UNEVEN if share > 0.5 else BALANCED, 0.08 + 0.4 * abs(2 * share - 1)
                box = Rectangle((column - 0.48, place - 0.46), 0.96, 0.92, color=colour, alpha=strength, linewidth=0)
                ax.add_patch(box)
                ax.text(column, place, estimate.text(digits), ha="center", va="center", fontsize=9, color=theme.ink)
        style(ax, theme, grid="")
        ax.set_xlim(-0.5, len(WHEN) - 0.5)
        ax.set_ylim(-0.5, len(methods) - 0.5)
        ax.set_yticks(range(len(methods)), list(reversed(methods)))
        ax.set_xticks(range(len(WHEN)), [title for title, *_ in WHEN])
        ax.tick_params(axis="both", length=0, colors=theme.ink, labelsize=9)
        ax.tick_params(axis="x", colors=theme.muted, labelsize=8)
        heading(ax, theme, "What a method leaves uneven", "lower is better; blue: below half of the column's worst")

    return picture("which-when", len(methods), draw, right=0.98)


def renamed(row: Row, name: str) -> Row:
    return Row(name, row.mean, row.half, row.even)


ALL: Mapping[str, Callable[[], Any]] = {
    "balance-helps": balance_helps,
    "ssr-balances": ssr_balances,
    "ssr-alone": ssr_alone,
    "which-when": which_when,
    "cost": cost,
}

if __name__ == "__main__":
    for make in ALL.values():
        print(make().relative_to(ROOT))
