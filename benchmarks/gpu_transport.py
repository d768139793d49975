"""Time of a pass, of a solve and of what others take for it, on a GPU.

    python benchmarks/gpu_transport.py [--reg 0.1] [--tol 1e-4] [--repeats 7] [--out FILE.json]

A pass should take about as long as reading the logits, which is timed next to it by a kernel that does nothing else. A
solve is timed launch by launch and in a CUDA graph. The others are told how many iterations bring their column error
to `tol`, found beforehand by doubling, so that their own tests of convergence cost them nothing; Megatron's Sinkhorn
has no such number and stops by its own rule, which the column error beside it is the result of.

Times are medians over repeats of many calls between two CUDA events, over copies of the logits that together exceed the
L2 cache; "cached" is the time over a single copy, which is how the passes of one solve find it.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine

SIZES = ((65536, 128), (65536, 8), (65536, 64), (65536, 256), (16384, 128), (4096, 64))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_ITERATIONS = 5120
L2_BYTES = 256 << 20  # more than any L2


@dataclass
class Benchmark:
    """Time of a pass and of a solve on a GPU, against reading the logits and against others."""

    reg: float = 0.1
    """ξ, in units of the logits' standard deviation."""
    tol: float = 1e-4
    """Column error to reach."""
    repeats: int = 7
    """Repeats; the median counts."""
    calls: int = 20
    """Calls in a repeat."""
    others: bool = True
    """Also time POT and Megatron-Core, where installed."""
    out: str | None = None
    """Also write the figures here, as JSON."""


Call = Callable[[Tensor], object]


def microseconds(call: Call, copies: Sequence[Tensor], benchmark: Benchmark) -> float:
    """Median time of `call` on the copies in turn, launch by launch."""
    for logits_TE in copies[:2]:
        call(logits_TE)
    times = []
    for _ in range(benchmark.repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for number in range(benchmark.calls):
            call(copies[number % len(copies)])
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / benchmark.calls)
    return statistics.median(times)


def graph_microseconds(call: Call, copies: Sequence[Tensor], benchmark: Benchmark) -> float:
    """Median time of `call` when a CUDA graph holds as many of them as a repeat makes."""
    call(copies[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(benchmark.calls):
            call(copies[number % len(copies)])
    once = Benchmark(**{**vars(benchmark), "calls": 1})
    return microseconds(lambda _: graph.replay(), copies[:1], once) / benchmark.calls


def column_error(plan_TE: Tensor) -> float:
    """max |column sum / target − 1| of a plan whose total mass may be anything."""
    sums_E = plan_TE.sum(dim=0, dtype=torch.float64)
    return float((sums_E / sums_E.mean() - 1).abs().max())


def pot(method: str) -> Callable[[Tensor, float, int], Tensor]:
    """POT's torch backend, for a given number of iterations."""
    import ot

    def plan(logits_TE: Tensor, reg: float, iterations: int) -> Tensor:
        tokens, experts = logits_TE.shape
        row_T, column_E = logits_TE.new_full((tokens,), 1 / tokens), logits_TE.new_full((experts,), 1 / experts)
        return ot.sinkhorn(
            row_T, column_E, -logits_TE, reg, method=method, numItermax=iterations, stopThr=0.0, warn=False
        )

    return plan


def megatron() -> Callable[[Tensor, float, int], Tensor]:
    """Megatron-Core's Sinkhorn, which stops by its own rule."""
    from megatron.core.transformer.moe import moe_utils

    return lambda logits_TE, reg, _: moe_utils.sinkhorn(logits_TE / reg)


OTHERS: dict[str, Callable[[], Callable[[Tensor, float, int], Tensor]]] = {
    "POT sinkhorn": lambda: pot("sinkhorn"),
    "POT sinkhorn_log": lambda: pot("sinkhorn_log"),
    "Megatron-Core sinkhorn": megatron,
}


def time_other(name: str, logits_TE: Tensor, benchmark: Benchmark) -> dict[str, Any]:
    """Time of a public solver on float32 logits, its iterations and its column error; or why there is none."""
    try:
        plan = OTHERS[name]()
    except ImportError:
        return {"note": "not installed"}
    logits_TE, own_rule = logits_TE.float(), name.startswith("Megatron")
    iterations, error = 5, math.inf
    while not error <= benchmark.tol and iterations < MOST_ITERATIONS:
        iterations *= 2
        error = column_error(plan(logits_TE, benchmark.reg, iterations))
        if own_rule or math.isnan(error):
            break
    if math.isnan(error):
        return {"note": "NaN"}
    few = Benchmark(**{**vars(benchmark), "calls": 2, "repeats": 3})
    microsecond = microseconds(lambda x: plan(x, benchmark.reg, iterations), [logits_TE], few)
    return {"microseconds": microsecond, "iterations": None if own_rule else iterations, "column_error": error}


def measure(tokens: int, experts: int, dtype: torch.dtype, benchmark: Benchmark) -> dict[str, Any]:
    """All figures of one size; see the table."""
    from gpu_read import read
    from sinkroute.kernels.gpu.fused import FusedPass
    from sinkroute.kernels.gpu.launch import search
    from sinkroute.transport import solve
    from sinkroute.transport.checks import make_problem

    generator = torch.Generator(device="cuda").manual_seed(0)
    logits_TE = torch.randn(tokens, experts, device="cuda", generator=generator).to(dtype)
    volume = logits_TE.numel() * logits_TE.element_size()
    copies = [logits_TE.clone() for _ in range(min(64, math.ceil(L2_BYTES / volume)))]
    potentials_E = torch.zeros(experts, dtype=torch.float64, device="cuda")
    reg = torch.full((1,), benchmark.reg, dtype=torch.float64, device="cuda")

    def make(logits_TE: Tensor) -> Any:
        return make_problem(logits_TE, benchmark.reg)

    passes = {x.data_ptr(): FusedPass(make(x)) for x in copies}
    problems = {x.data_ptr(): make(x) for x in copies}

    def one_pass(x: Tensor) -> Tensor:
        return passes[x.data_ptr()].column_sums(potentials_E, reg)

    def one_solve(x: Tensor) -> Any:
        asked = problems[x.data_ptr()]
        given = asked, asked.target_E, asked.positive_E, asked.reg
        return search(*given, tol=benchmark.tol, max_passes=None, init_E=None, reduce=None)

    found = solve(logits_TE, benchmark.reg, tol=benchmark.tol)
    return {
        "tokens": tokens,
        "experts": experts,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": volume,
        "read": graph_microseconds(read, copies, benchmark),
        "pass": graph_microseconds(one_pass, copies, benchmark),
        "read_cached": graph_microseconds(read, copies[:1], benchmark),
        "pass_cached": graph_microseconds(one_pass, copies[:1], benchmark),
        "solve_graph": graph_microseconds(one_solve, copies, benchmark),
        "solve_eager": microseconds(one_solve, copies, benchmark),
        "topk_graph": graph_microseconds(lambda _: found.topk(2), copies[:1], benchmark),
        "passes": found.passes,
        "column_error": float(found.column_error),
        "others": {name: time_other(name, logits_TE, benchmark) for name in OTHERS} if benchmark.others else {},
    }


def tables(rows: list[dict[str, Any]], benchmark: Benchmark) -> list[Table]:
    """Our own figures, then what the others take."""
    own = Table(title=f"Microseconds; ξ = {benchmark.reg:g}, column error ≤ {benchmark.tol:g}")
    for name in ("size", "read", "TB/s", "pass", "TB/s", "pass / read", "cached", "solve, graph", "eager", "top 2"):
        own.add_column(name, justify="left" if name == "size" else "right")
    own.add_column("passes", justify="right")
    other = Table(title=f"Microseconds of others to a column error of {benchmark.tol:g} on float32")
    for name in ("size", *OTHERS):
        other.add_column(name, justify="left" if name == "size" else "right")
    for row in rows:
        size = f"{row['tokens']} × {row['experts']} {row['dtype']}"
        own.add_row(
            size,
            f"{row['read']:.1f}",
            f"{row['bytes'] / row['read'] / 1e6:.2f}",
            f"{row['pass']:.1f}",
            f"{row['bytes'] / row['pass'] / 1e6:.2f}",
            f"{row['pass'] / row['read']:.2f}",
            f"{row['pass_cached'] / row['read_cached']:.2f}",
            f"{row['solve_graph']:.0f}",
            f"{row['solve_eager']:.0f}",
            f"{row['topk_graph']:.1f}",
            str(row["passes"]),
        )
        if row["others"]:
            other.add_row(size, *(words(row["others"][name], benchmark.tol) for name in OTHERS))
    return [own, other] if other.rows else [own]


def words(figure: dict[str, Any], tol: float) -> str:
    """A figure of `time_other` as a cell of the table."""
    if "note" in figure:
        return str(figure["note"])
    of = "own rule" if figure["iterations"] is None else f"{figure['iterations']} iterations"
    missed = "" if figure["column_error"] <= tol else f", error {figure['column_error']:.1e}"
    return f"{figure['microseconds']:.0f} ({of}{missed})"


def main() -> None:
    benchmark = tyro.cli(Benchmark)
    if not torch.cuda.is_available():
        sys.exit("gpu_transport: no CUDA device; this benchmark needs one, and torch built for CUDA")
    torch.set_grad_enabled(False)
    sizes = [(*size, dtype) for size in SIZES for dtype in DTYPES.values()]
    rows = [measure(*size, benchmark) for size in track(sizes, "sizes")]
    about = machine()
    console = Console()
    for table in tables(rows, benchmark):
        table.caption = f"{about['gpu']}, torch {about['torch']}; {benchmark.repeats} × {benchmark.calls} calls"
        console.print(table)
    if benchmark.out:
        write_json({"machine": about, "settings": vars(benchmark), "rows": rows}, Path(benchmark.out))


if __name__ == "__main__":
    main()
