"""What watching the routers costs: a whole training step with `LoadMonitor` relative to the same step without.

    python benchmarks/monitor.py [--repeats 7] [--pairs 40] [--out FILE.json]

Machines drift, so steps alternate, in an order that is shuffled at each turn, on one and the same model: a monitor is
attached before a step that is timed with it and removed after. A step's time is set against the step without of the
same turn; a repeat is the median of those ratios; the table shows the median repeat with the smallest and the largest.
"nothing, again" is a step without a monitor: what the benchmark calls a difference where there is none.

A ratio cannot show less than that noise. So the hooks are also timed by themselves, all layers, on what the routers of
a step were given and gave, and so is the reading of the numbers, which happens once in a window of many steps.
"""

from __future__ import annotations

import json
import random
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
from sinkroute.lab.config import Config, ModelConfig, RouterConfig
from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine
from sinkroute.lab.training import make_model
from sinkroute.routing.monitor import Tier

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
    order = random.Random(0)
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds if kind != NOTHING}
    plain = []
    for _ in range(3):
        step()
    for _ in track(range(benchmark.repeats), f"p = {router.options['probability']:g}"):
        paired: dict[str, list[float]] = {kind: [] for kind in ratios}
        for _ in range(benchmark.pairs):
            seconds = {}
            for kind in order.sample(list(kinds), len(kinds)):
                with kinds[kind]():
                    begin = clock()
                    step()
                    seconds[kind] = clock() - begin
            plain.append(seconds[NOTHING])
            for kind, values in paired.items():
                values.append(seconds[kind] / seconds[NOTHING])
        for kind, values in paired.items():
            ratios[kind].append(statistics.median(values))
    step_ms = 1e3 * statistics.median(plain)
    calls = router_calls(model, step)
    hooks_ms = {}
    for tier, monitor in monitors.items():
        with monitor:
            hooks_ms[tier] = milliseconds(lambda: replay(calls), device)
    return {
        "step_ms": step_ms,
        "ratios": ratios,
        "hooks_ms": hooks_ms,
        "hooks_share": {tier: value / step_ms for tier, value in hooks_ms.items()},
        "metrics_ms": {tier: milliseconds(monitor.metrics, device) for tier, monitor in monitors.items()},
    }


def router_calls(model: nn.Module, step: Callable[[], None]) -> list[tuple[Any, ...]]:
    """(router, args, kwargs, routes) of every call in one step."""
    calls: list[tuple[Any, ...]] = []
    handles = [
        part.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
        for part in model.modules()
        if isinstance(part, Router)
    ]
    step()
    for handle in handles:
        handle.remove()
    return calls


def replay(calls: list[tuple[Any, ...]]) -> None:
    """All hooks of a step, and nothing else."""
    for router, args, kwargs, routes in calls:
        for hook in router._forward_hooks.values():
            hook(router, args, kwargs, routes)


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
    for column in ("step", "monitor", "median", "smallest", "largest", "hooks alone", "one metrics()"):
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
