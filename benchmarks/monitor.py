"""What watching the routers costs: a whole training step with `LoadMonitor` relative to the same step without.

    python benchmarks/monitor.py [--repeats 7] [--pairs 40] [--out FILE.json]

Machines drift, so steps alternate, in an order that is shuffled at each turn, on one and the same model: a monitor is
attached before a step that is timed with it and removed after. A step's time is set against the step without of the
same turn; a repeat is the median of those ratios; the table shows the median repeat with the smallest and the largest.
"nothing, again" is a step without a monitor: what the benchmark calls a difference where there is none.

A ratio cannot show less than that noise. So the hooks of all layers are also timed from their begin to their end within
whole steps (on a GPU that is the host's part), and so is the reading of the numbers, once in a window of many steps.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from sinkroute import LoadMonitor, Router, set_step
from sinkroute.lab.bench.timing import alternate
from sinkroute.lab.config import Config, ModelConfig, RouterConfig
from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine
from sinkroute.lab.models import make_model
from sinkroute.routing.watch import Tier

BRANCHES = {
    "softmax step": RouterConfig("ssr-s", {"probability": 0.0}),
    "Sinkhorn step": RouterConfig("ssr-s", {"probability": 1.0}),
}
NOTHING, AGAIN = "nothing", "nothing, again"
# On a CPU the process's own time, on one thread: what else the machine does is not counted.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


@dataclass
class Benchmark:
    """Time of a training step of the demo's model with its routers watched, relative to the same step without."""

    repeats: int = 7
    """Repeats; each gives one ratio."""
    pairs: int = 40
    """Steps of each kind in a repeat."""
    batch: int = 16
    """Sequences in a batch."""
    length: int = 128
    """Bytes in a sequence."""
    out: str | None = None
    """Also write the figures here, as JSON."""


def stepper(model: nn.Module, symbols: torch.Tensor) -> Callable[[], None]:
    """A function that makes one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    count = 0

    def step() -> None:
        nonlocal count
        set_step(model, count)
        count += 1
        F.cross_entropy(model(symbols[:, :-1]).flatten(0, 1), symbols[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait(symbols.device)

    return step


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any], device: torch.device, times: int = 200) -> float:
    """The median of single calls."""
    seconds = []
    for _ in range(times):
        begin = clock()
        function()
        wait(device)
        seconds.append(clock() - begin)
    return 1e3 * statistics.median(seconds)


def measure(benchmark: Benchmark, router: RouterConfig) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(Config(model=ModelConfig(), router=router)).to(device).train()
    generator = torch.Generator().manual_seed(0)
    symbols = torch.randint(0, 256, (benchmark.batch, benchmark.length + 1), generator=generator).to(device)
    step = stepper(model, symbols)
    monitors = {tier: LoadMonitor(model, tier) for tier in get_args(Tier)}
    for monitor in monitors.values():
        monitor.remove()
    kinds: dict[str, Callable[[], Any]] = {NOTHING: nullcontext, AGAIN: nullcontext}
    kinds |= {tier: monitor.attach for tier, monitor in monitors.items()}
    for _ in range(3):
        step()

    def timed(kind: str) -> float:
        with kinds[kind]():
            begin = clock()
            step()
            return clock() - begin

    repeats = track(range(benchmark.repeats), f"p = {router.options['probability']:g}")
    _, step_ms, ratios = alternate([list(kinds)] * benchmark.pairs, NOTHING, timed, repeats=repeats)
    del ratios[NOTHING]
    hooks_ms = {tier: hooks_in_steps(model, monitor, step) for tier, monitor in monitors.items()}
    return {
        "step_ms": step_ms,
        "ratios": ratios,
        "hooks_ms": hooks_ms,
        "hooks_share": {tier: value / step_ms for tier, value in hooks_ms.items()},
        "metrics_ms": {tier: milliseconds(monitor.metrics, device) for tier, monitor in monitors.items()},
    }


def hooks_in_steps(model: nn.Module, monitor: LoadMonitor, step: Callable[[], None], times: int = 40) -> float:
    """Milliseconds that the hooks of all layers take in a step, as part of it: the median over steps."""
    routers = [part for part in model.modules() if isinstance(part, Router)]
    begun, spent = 0.0, 0.0

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = clock()

    def end(*_: Any) -> None:
        nonlocal spent
        spent += clock() - begun

    # Hooks run in the order in which they were registered.
    before = [router.register_forward_hook(begin) for router in routers]
    by_step = []
    with monitor:
        after = [router.register_forward_hook(end) for router in routers]
        for _ in range(times):
            spent = 0.0
            step()
            by_step.append(spent)
    for handle in before + after:
        handle.remove()
    return 1e3 * statistics.median(by_step)


def main() -> None:
    benchmark = tyro.cli(Benchmark)
    torch.set_num_threads(1)
    results = {branch: measure(benchmark, router) for branch, router in BRANCHES.items()}
    about = {**machine(), "threads": 1, "clock": clock.__name__}
    table = Table(
        title=f"Step time relative to the same step without a monitor ({benchmark.batch} × {benchmark.length} bytes)",
        caption=f"{about['gpu'] or about['cpu']}, 1 thread, {clock.__name__}, torch {about['torch']}; "
        f"{benchmark.repeats} repeats of {benchmark.pairs} alternating steps",
    )
    for column in ("step", "monitor", "median", "smallest", "largest", "of it hooks", "one metrics()"):
        table.add_column(column, justify="left" if column in ("step", "monitor") else "right")
    for branch, result in results.items():
        for kind, values in result["ratios"].items():
            row = [branch, kind, *(f"{value:.4f}" for value in (statistics.median(values), min(values), max(values)))]
            if kind in result["hooks_ms"]:
                share = f"{result['hooks_ms'][kind]:.3f} ms ({result['hooks_share'][kind]:.2%})"
                row += [share, f"{result['metrics_ms'][kind]:.2f} ms"]
            table.add_row(*row)
        table.add_row(branch, "(the step)", "", "", "", f"{result['step_ms']:.1f} ms", "")
    Console(width=120).print(table)
    if benchmark.out:
        settings = {name: getattr(benchmark, name) for name in ("repeats", "pairs", "batch", "length")}
        content = {"machine": about, "settings": settings, "results": results}
        write_json(json.loads(json.dumps(content)), Path(benchmark.out))


if __name__ == "__main__":
    main()
