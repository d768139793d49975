"""Balanced mass is not balanced load: how even the experts' loads are once the plan's top-k has been taken.

    python benchmarks/mass_and_load.py [--tokens 16384] [--experts 64] [--seeds 3] [--out FILE.json] [--picture PNG]

The plan gives every expert the same mass, Σ_i Π_ij. A router uses its k largest entries per token, and how many tokens
choose an expert is another number. The table shows MaxVio, the load of the busiest expert over the mean minus 1, of
plain top-k of the logits, of top-k of the plan at several ξ, and of `balanced_topk`, which balances loads themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine
from sinkroute.transport import balanced_topk, solve

REGS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
KS = (1, 2, 4, 8)
SCORES = {"even experts": (4.0, 0.0), "biased experts": (1.0, 2.0)}  # scale, standard deviation of an expert's bias
COSTS = ("linear", "softmax")
COLOURS = ("#0072b2", "#008f68", "#d99200", "#d55e00")


@dataclass
class Benchmark:
    """MaxVio of plain top-k, of the plan's top-k and of balanced_topk."""

    tokens: int = 16384
    """Tokens."""
    experts: int = 64
    """Experts."""
    seeds: int = 3
    """Draws of the logits; the table shows their mean."""
    out: str | None = None
    """Also write the figures here, as JSON."""
    picture: str | None = None
    """Also draw them here, as PNG."""


def max_vio(experts_TK: Tensor, experts: int) -> float:
    """Load of the busiest expert over the mean load, minus 1."""
    load_E = torch.bincount(experts_TK.flatten(), minlength=experts).double()
    return float(load_E.max() / load_E.mean() - 1)


def measure(options: Benchmark) -> list[dict[str, object]]:
    """One row per kind of logits, cost and k: MaxVio by method, a mean over the seeds."""
    rows: list[dict[str, object]] = []
    cases = [(name, cost) for name in SCORES for cost in COSTS]
    for name, cost in track(cases, description="solving", transient=True):
        scale, bias = SCORES[name]
        found: dict[tuple[int, str], list[float]] = {}
        for seed in range(options.seeds):
            generator = torch.Generator().manual_seed(seed)
            logits_TE = scale * torch.randn(options.tokens, options.experts, generator=generator)
            logits_TE += bias * torch.randn(options.experts, generator=generator)
            plans = {reg: solve(logits_TE, reg, cost, tol=1e-4) for reg in REGS}
            assert all(bool(plan.converged) for plan in plans.values())
            for k in KS:
                chosen = {"plain": logits_TE.topk(k, dim=1).indices}
                chosen |= {f"plan {reg:g}": plan.topk(k)[1] for reg, plan in plans.items()}
                chosen["balanced_topk"] = balanced_topk(logits_TE, k, cost=cost)[0]
                for method, experts_TK in chosen.items():
                    found.setdefault((k, method), []).append(max_vio(experts_TK, options.experts))
        for k in KS:
            by_method = {method: sum(x) / len(x) for (at, method), x in found.items() if at == k}
            rows.append({"scores": name, "cost": cost, "k": k, "max_vio": by_method})
    return rows


def show(rows: list[dict[str, object]], console: Console) -> None:
    """The rows as a table."""
    table = Table(title="MaxVio after top-k", caption="0 is balance; E / k − 1 is k experts taking everything")
    for heading in ("scores", "cost", "k", "plain", *(f"ξ {reg:g}" for reg in REGS), "balanced_topk"):
        table.add_column(heading, justify="left" if heading in ("scores", "cost") else "right", no_wrap=True)
    for row in rows:
        values = row["max_vio"]
        assert isinstance(values, dict)
        table.add_row(str(row["scores"]), str(row["cost"]), str(row["k"]), *(f"{x:.3f}" for x in values.values()))
    console.print(table)


def draw(rows: list[dict[str, object]], options: Benchmark, path: Path) -> None:
    """Four panels, one curve per k over ξ; what plain top-k does as a dot at the right."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True, sharey=True)
        for (name, cost), panel in zip([(n, c) for n in SCORES for c in COSTS], axes.flat, strict=True):
            _panel(panel, [row for row in rows if row["scores"] == name and row["cost"] == cost])
            panel.set_title(f"{name}, {cost} cost", loc="left", fontsize=10, fontweight="bold")
        axes[0, 0].legend(frameon=False, fontsize=8.5, loc="upper left", ncols=2)
        for panel in axes[1]:
            panel.set_xlabel("ξ of the plan")
        for panel in axes[:, 0]:
            panel.set_ylabel("MaxVio of the loads")
        figure.suptitle(
            f"Every plan here balances mass to 1e-4. The loads of its top-k are another matter "
            f"({options.tokens} tokens, {options.experts} experts)",
            fontsize=11,
        )
        figure.savefig(path, dpi=130)


def _panel(panel: Axes, rows: list[dict[str, object]]) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(0.0085, 3.4)
    panel.axhspan(1e-3, 0.01, color="#008f68", alpha=0.10, lw=0)
    panel.text(0.0095, 0.0016, "balanced_topk: all at most 0.01", color="#00694c", fontsize=8.5)
    for row, colour in zip(rows, COLOURS, strict=True):
        values = row["max_vio"]
        assert isinstance(values, dict)
        curve = [max(values[f"plan {reg:g}"], 1.2e-3) for reg in REGS]
        panel.plot(REGS, curve, color=colour, marker="o", ms=3.5, lw=1.6, label=f"top-{row['k']} of the plan")
        panel.plot([2.4], [values["plain"]], color=colour, marker="D", ms=5, ls="none")
    panel.text(2.4, 1.25e-3, "plain\ntop-k", ha="center", va="bottom", fontsize=8)
    panel.set_ylim(1e-3, 60)
    panel.grid(axis="y", alpha=0.25, lw=0.6)


def main() -> None:
    """Measure, show, write."""
    options = tyro.cli(Benchmark, description=__doc__)
    torch.set_num_threads(1)
    console = Console(width=max(Console().width, 124))
    rows = measure(options)
    show(rows, console)
    if options.out:
        write_json({"machine": machine(), "options": vars(options), "rows": rows}, Path(options.out))
    if options.picture:
        draw(rows, options, Path(options.picture))


if __name__ == "__main__":
    main()
