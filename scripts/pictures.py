"""The pictures of docs/how-it-works.md, drawn by what they show: `python scripts/pictures.py [--out docs/pictures]`.

- `plan.svg`: softmax and a transport plan of the same few tokens, with what each expert gets.
- `potentials.svg`: the solver's potentials pass by pass, and how far columns are from balance.
- `passes.svg`: what each expert gets meanwhile, moving; still for those who ask for less motion.
- `loads.svg`: loads of experts over training, left alone and with ssr-dual, from the study's kept results.

Words are kept as text, on a ground of a single colour that suits a light page and a dark one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from sinkroute.lab.page import loads
from sinkroute.lab.page.drawing import heading, paper_theme, settings, style
from sinkroute.lab.page.palette import inks
from sinkroute.transport import Plan, solve

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "study" / "kept" / "rates.jsonl"
WIDTH, PAPER = 6.4, "#fbfaf7"
THEME = paper_theme(inks(["load-balance", "ssr-s", "sinkhorn"]))
BLUE, ORANGE, _ = THEME.methods


def skewed(tokens: int, experts: int, scale: float) -> torch.Tensor:
    """Logits (T, E) of which some experts are better liked than others."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(tokens, experts, generator=draw) + scale * torch.linspace(1, -1, experts)


def pixels(ax: Axes, colours: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    """A rectangle for each colour (rows, columns, 4), not smoothed."""
    ax.imshow(np.round(255 * colours).astype(np.uint8), extent=extent, interpolation="none", aspect="auto")


def plan() -> Figure:
    """Rows are tokens, columns experts; the two largest of a row are framed."""
    logits_TE = skewed(12, 6, 1.2)
    panels = {
        "Softmax": torch.softmax(logits_TE, dim=1),
        "Transport plan": solve(logits_TE, reg=0.5, tol=1e-6).matrix(),
    }
    fig = Figure((WIDTH, 4.5), facecolor=PAPER)
    for ax, (name, matrix_TE) in zip(fig.subplots(1, 2), panels.items(), strict=True):
        style(ax, THEME, grid="")
        ax.spines["bottom"].set_visible(False)
        pixels(ax, colormaps["Blues"](matrix_TE.numpy() / 1.3), (0, 6, 12, 0))
        chosen_TK = matrix_TE.topk(2).indices
        for token, row in enumerate(chosen_TK.tolist()):
            for expert in row:
                ax.add_patch(Rectangle((expert + 0.08, token + 0.08), 0.84, 0.84, fill=False, ec=ORANGE, lw=1.4))
        ax.set_xlim(0, 6)
        ax.set_ylim(14.2, 0)
        ax.set_xticks([])
        ax.set_yticks([5.5], ["12 tokens"] if name == "Softmax" else [""], rotation=90, va="center")
        load_E = torch.bincount(chosen_TK.flatten(), minlength=6)
        below = {
            "mass": (matrix_TE.sum(0), "{:.1f}", THEME.ink, "fair: 2"),
            "load": (load_E, "{:.0f}", THEME.words[1], "fair: 4"),
        }
        for y, (word, (sums_E, form, ink, fair)) in zip((12.9, 13.8), below.items(), strict=True):
            for expert, value in enumerate(sums_E.tolist()):
                ax.text(expert + 0.5, y, form.format(value), color=ink, ha="center", fontsize=9.5)
            if name == "Softmax":
                ax.text(-0.15, y, word, color=ink, ha="right", fontsize=9.5)
            else:
                ax.text(6.12, y, fair, color=ink, fontsize=9)
        heading(ax, THEME, name, "6 experts")
    fig.subplots_adjust(left=0.085, right=0.905, top=0.9, bottom=0.02, wspace=0.1)
    return fig


PASSES = range(1, 10)


def stopped() -> dict[str, list[Plan]]:
    """Of one problem, what each method has found when it is stopped after so many passes."""
    logits_TE = skewed(4096, 8, 1.5)
    return {
        name: [solve(logits_TE, reg=0.1, tol=1e-7, max_passes=passes, method=method) for passes in PASSES]
        for name, method in (("solve", "dual"), ("Sinkhorn", "sinkhorn"))
    }


def potentials() -> Figure:
    """The potentials that `solve` has found after so many passes; the error, and that of Sinkhorn's iteration."""
    found = stopped()
    fig = Figure((WIDTH, 3.1), facecolor=PAPER)
    left, right = fig.subplots(1, 2)
    for ax in (left, right):
        style(ax, THEME)
        ax.set_xlabel("passes over the logits")
        ax.set_xticks([1, 3, 5, 7, 9])
    for expert, path in enumerate(torch.stack([each.potentials for each in found["solve"]]).T.tolist()):
        left.plot(PASSES, path, color=BLUE, lw=1.5, marker="o", ms=2.5, alpha=0.45 + 0.07 * expert)
    heading(left, THEME, "Potentials", "a line for each expert")
    for name, ink, word in (("Sinkhorn", ORANGE, THEME.words[1]), ("solve", BLUE, THEME.words[0])):
        errors = [float(each.column_error) for each in found[name]]
        right.plot(PASSES, errors, color=ink, lw=1.8, marker="o", ms=3)
        right.annotate(
            name, (PASSES[-1], errors[-1]), (0, 7), textcoords="offset points", color=word, ha="right", fontsize=9.5
        )
    right.set_yscale("log")
    right.yaxis.set_major_formatter(FuncFormatter(lambda error, _: "1" if error == 1 else f"1e{math.log10(error):.0f}"))
    right.yaxis.set_minor_locator(NullLocator())
    heading(right, THEME, "Column error", "largest, relative")
    fig.subplots_adjust(left=0.07, right=0.98, top=0.86, bottom=0.17, wspace=0.22)
    return fig


def passes() -> str:
    """Bars of what each expert gets, from no potentials at all to those after nine passes; they rest at the last."""
    still = torch.softmax(skewed(4096, 8, 1.5).double() / 0.1, dim=1).sum(0)
    moves, bars, words = [], [], []
    for panel, (name, plans) in enumerate(stopped().items()):
        ink, left = (BLUE, ORANGE)[panel], 24 + 296 * panel
        bars.append(f'<text x="{left}" y="28" fill="{THEME.ink}" class="name">{name}</text>')
        sums = torch.stack([still, *(plan.matrix().sum(0).double() for plan in plans)]) / 512
        for expert, heights in enumerate(sums.T.tolist()):
            stops = "".join(
                f"{7 * moment}%,{7 * moment + 4}%{{transform:scaleY({height:.3f})}}"
                for moment, height in enumerate(heights)
            )
            moves.append(f"@keyframes b{panel}{expert}{{{stops}100%{{transform:scaleY({heights[-1]:.3f})}}}}")
            bars.append(
                f'<rect x="{left + 32 * expert}" y="136" width="24" height="34" fill="{ink}" '
                f'style="transform:scaleY({heights[-1]:.3f});animation-name:b{panel}{expert}"/>'
            )
        bars.append(f'<path d="M{left - 4} 136h{32 * 8}" stroke="{THEME.ink}" stroke-dasharray="3 3"/>')
    for moment in (0, *PASSES):
        begins, ends = 7 * moment - 2, 7 * moment + 5 if moment < PASSES[-1] else 100
        stops = f"{max(begins, 0)}%,{ends}%{{opacity:1}}" + (f"{ends + 0.01}%,100%{{opacity:0}}" if ends < 100 else "")
        stops = (f"0%,{begins - 0.01}%{{opacity:0}}" if begins > 0 else "") + stops
        moves.append(f"@keyframes w{moment}{{{stops}}}")
        words.append(
            f'<text x="297" y="194" text-anchor="middle" fill="{THEME.muted}" opacity="{int(moment == PASSES[-1])}" '
            f'style="animation-name:w{moment}">after {moment} pass{"es" * (moment != 1)}; dashed: a fair share</text>'
        )
    style_ = (
        "text{font:12.5px 'DejaVu Sans',sans-serif}.name{font-weight:bold}"
        "rect{transform-box:fill-box;transform-origin:bottom}"
        "rect,text{animation-duration:14s;animation-iteration-count:infinite}"
        "@media (prefers-reduced-motion:reduce){rect,text{animation:none!important}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 594 206" width="594" height="206"><style>{style_}'
        f'{"".join(moves)}</style><path fill="{PAPER}" d="M0 0h594v206H0z"/>{"".join(bars)}{"".join(words)}</svg>\n'
    )


def kept_loads(cell: str) -> tuple[list[int], np.ndarray]:
    """Steps of a kept cell's lines, and loads (lines, layers, experts) over a fair share."""
    cells = map(json.loads, KEPT.read_text(encoding="utf-8").splitlines())
    log = next(each["log"] for each in cells if each["name"] == cell)
    rows = [line for line in log if line["kind"] == "train"]
    counts = np.array([line["load"] for line in rows], dtype=float)
    return [line["step"] for line in rows], counts / counts.mean(axis=2, keepdims=True)


def loads_over_training() -> Figure:
    """Loads of a layer's 16 experts, a row for 25 steps, of one seed at the middle learning rate."""
    panels = {"Left alone": "0.006-vanilla-seed60", "ssr-dual": "0.006-ssr-dual-seed60"}
    found = {name: kept_loads(cell) for name, cell in panels.items()}
    steps = next(iter(found.values()))[0]
    relative = {name: loads_TLE[:, 1] for name, (_, loads_TLE) in found.items()}
    top = max(values.max() for values in relative.values())
    fig = Figure((WIDTH, 3.9), facecolor=PAPER)
    axes = fig.subplots(1, 2, sharey=True)
    for ax, (name, values) in zip(axes, relative.items(), strict=True):
        style(ax, THEME, grid="")
        pixels(ax, loads.rgba(values, top), (0, 16, steps[-1], 0))
        ax.set_xticks([0.5, 8.5, 15.5], ["0", "8", "15"])
        ax.set_xlabel("expert")
        heading(ax, THEME, name, f"busiest at the end: {values[-1].max():.1f} × fair")
    axes[0].set_ylabel("training step")
    _scale(fig.add_axes((0.25, 0.095, 0.5, 0.035)), top)
    fig.subplots_adjust(left=0.1, right=0.98, top=0.89, bottom=0.29, wspace=0.1)
    return fig


def _scale(ax: Axes, top: float) -> None:
    style(ax, THEME, grid="")
    share = (np.arange(200) + 0.5) / 200
    pixels(ax, loads.rgba(np.where(share < 0.5, 2 * share, top ** (2 * share - 1)), top)[None], (0, 1, 0, 1))
    places, words = zip(*loads.ticks(top), strict=True)
    ax.set_xticks(places, words)
    ax.set_yticks([])


PICTURES: dict[str, Callable[[], Figure | str]] = {
    "plan": plan,
    "potentials": potentials,
    "passes": passes,
    "loads": loads_over_training,
}


def draw(name: str, path: Path) -> None:
    """The same bytes every time on one machine."""
    with settings("none"):
        picture = PICTURES[name]()
        if isinstance(picture, str):
            path.write_text(picture, encoding="utf-8")
            return
        FigureCanvasSVG(picture)
        picture.savefig(path, format="svg", facecolor=PAPER, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        draw(name, out / f"{name}.svg")
        print(out / f"{name}.svg", f"{(out / f'{name}.svg').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
