"""Time and quality of `balanced_topk`, relative to one plain `torch.topk` of the same logits.

    python benchmarks/balanced_topk.py [--repeats 5] [--seed 0] [--out FILE.json]

Scores are scale · randn(T, E) + 2 · randn(E) in float32; with hundreds of experts and more, randn(T, E) as well. Times
are CPU times of one thread, best of the repeats, the two in alternation. "MiB" is what a call takes beside the logits,
at its most. "Bound" is the value in float64 of the linear programme's dual at the returned bias: no choice with
loads exactly on target has a larger sum of costs. Up to `tol` off the target a choice may have a larger one.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine
from sinkroute.transport import BalancedTopK, balanced_topk

SKEW = 2.0
CASES = [
    *itertools.product(((16384, 64), (65536, 128)), ((1.0, SKEW), (4.0, SKEW)), ("linear", "softmax"), (1, 2, 4, 8)),
    *itertools.product(
        ((4096, 512), (4096, 1024), (4096, 2048), (4096, 4096)),
        ((1.0, 0.0), (1.0, SKEW), (4.0, SKEW)),
        ("linear", "softmax"),
        (8,),
    ),
]


@dataclass
class Benchmark:
    """Time and quality of balanced_topk."""

    repeats: int = 5
    """Repeats; the best counts."""
    seed: int = 0
    """Of the logits."""
    tol: float = 0.01
    """MaxVio to ask for."""
    out: str | None = None
    """Also write the figures here, as JSON."""


def cpu_ms(function: Callable[[], object]) -> float:
    """CPU time of one call in this thread, in milliseconds."""
    start = time.thread_time()
    function()
    return 1e3 * (time.thread_time() - start)


def resident_mib(function: Callable[[], object]) -> float:
    """The memory of the process at its most within one call, beyond that before it, in MiB; NaN but on Linux."""

    def read(name: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was taken and given back would not be seen to be taken again
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    except (OSError, AttributeError):
        return math.nan
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


def over_bound(cost_TE: Tensor, found: BalancedTopK, k: int) -> float:
    """Sum of the chosen costs over the dual bound for exact loads, minus 1."""
    cost_TE = cost_TE.double()
    bias_E = found.bias.double()
    bound = (cost_TE + bias_E).topk(k, dim=1).values.sum() - k * cost_TE.shape[0] / cost_TE.shape[1] * bias_E.sum()
    return float(cost_TE.gather(1, found.experts).sum() / bound - 1)


def measure(options: Benchmark) -> list[dict[str, object]]:
    """One row per case."""
    rows: list[dict[str, object]] = []
    for (tokens, experts), (scale, skew), cost, k in track(CASES, description="balancing", transient=True):
        generator = torch.Generator().manual_seed(options.seed)
        logits_TE = scale * torch.randn(tokens, experts, generator=generator)
        logits_TE += skew * torch.randn(experts, generator=generator)
        found = balanced_topk(logits_TE, k, options.tol, cost=cost)
        ours, plain = [], []
        for _ in range(options.repeats):
            ours.append(cpu_ms(lambda s=logits_TE, k=k, c=cost: balanced_topk(s, k, options.tol, cost=c)))  # type: ignore[misc]
            plain.append(cpu_ms(lambda s=logits_TE, k=k: s.topk(k, dim=1)))  # type: ignore[misc]
        load_E = torch.bincount(found.experts.flatten(), minlength=experts).double()
        cost_TE = logits_TE if cost == "linear" else logits_TE.softmax(dim=1)
        rows.append(
            {
                "tokens": tokens,
                "experts": experts,
                "scale": scale,
                "skew": skew,
                "cost": cost,
                "k": k,
                "ms": min(ours),
                "ratio": min(ours) / min(plain),
                "mib": resident_mib(lambda s=logits_TE, k=k, c=cost: balanced_topk(s, k, options.tol, cost=c)),  # type: ignore[misc]
                "passes": found.passes,
                "moves": found.moves,
                "max_vio": float(load_E.max() / load_E.mean() - 1),
                "over_bound": over_bound(cost_TE, found, k),
            }
        )
    return rows


def show(rows: list[dict[str, object]], console: Console) -> None:
    """The rows as a table."""
    table = Table(title="balanced_topk, one thread")
    for heading in ("T × E", "scale", "cost", "k", "ms", "/ topk", "MiB", "passes", "moves", "MaxVio", "over bound"):
        table.add_column(heading, justify="left" if heading == "cost" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['tokens']} × {row['experts']}",
            f"{row['scale']:g}" + (", skewed" if row["skew"] else ""),
            str(row["cost"]),
            str(row["k"]),
            f"{row['ms']:.1f}",
            f"{row['ratio']:.1f}",
            f"{row['mib']:.0f}",
            str(row["passes"]),
            str(row["moves"]),
            f"{row['max_vio']:.2%}",
            f"{row['over_bound']:+.3%}",
        )
    console.print(table)


def main() -> None:
    """Measure, show, write."""
    options = tyro.cli(Benchmark, description=__doc__)
    torch.set_num_threads(1)
    rows = measure(options)
    show(rows, Console(width=max(Console().width, 100)))
    if options.out:
        write_json({"machine": machine(), "options": vars(options), "rows": rows}, Path(options.out))


if __name__ == "__main__":
    main()
