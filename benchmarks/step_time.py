"""Time of a whole training step (forward, backward, AdamW) with each router, relative to vanilla top-k.

    python benchmarks/step_time.py [--repeats 7] [--pairs 40] [--threads 2] [--out FILE.json]

Machines drift, so nothing is compared across time: steps of all variants alternate, in an order that is shuffled at
each turn, and a variant's time is set against vanilla's of the same turn. A repeat is the median of those ratios; the
table shows the median repeat with the smallest and the largest. SSR's two branches are timed apart (p = 0 and p = 1),
since at p = 0.001 a benchmark would need thousands of steps to see the second at all; the step time at any p is their
weighted mean.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sinkroute.lab.config import Config, ModelConfig, RouterConfig
from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine
from sinkroute.lab.models import make_model
from sinkroute.routing import set_step

VARIANTS: dict[str, RouterConfig] = {
    "softmax": RouterConfig("softmax"),
    "softmax again": RouterConfig("softmax"),  # what the benchmark calls a difference when there is none
    "load-balance": RouterConfig("load-balance"),
    "z-loss": RouterConfig("z-loss"),
    "sinkhorn": RouterConfig("sinkhorn"),
    "ssr-l, softmax step": RouterConfig("ssr-l", {"probability": 0.0}),
    "ssr-l, Sinkhorn step": RouterConfig("ssr-l", {"probability": 1.0}),
    "ssr-s, softmax step": RouterConfig("ssr-s", {"probability": 0.0}),
    "ssr-s, Sinkhorn step": RouterConfig("ssr-s", {"probability": 1.0}),
}
PROBABILITIES = (0.001, 0.01, 0.1)


@dataclass
class Benchmark:
    """Time of a training step with each router, relative to vanilla top-k."""

    repeats: int = 7
    """Repeats; each gives one ratio per router."""
    pairs: int = 40
    """Steps of each router in a repeat."""
    batch: int = 16
    """Sequences in a batch."""
    length: int = 128
    """Bytes in a sequence."""
    threads: int = 2
    """Threads of torch."""
    out: str | None = None
    """Also write the figures here, as JSON."""


def stepper(router: RouterConfig, batch: int, length: int, device: torch.device) -> Callable[[], None]:
    """A function that makes one training step of the demo's model."""
    model = make_model(Config(model=ModelConfig(), router=router)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    symbols = torch.randint(0, 256, (batch, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    count = 0

    def step() -> None:
        nonlocal count
        set_step(model, count)
        count += 1
        loss = F.cross_entropy(model(symbols[:, :-1]).flatten(0, 1), symbols[:, 1:].flatten())
        auxiliary = model.auxiliary_loss()
        (loss if auxiliary is None else loss + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(benchmark: Benchmark) -> tuple[dict[str, list[float]], float]:
    """Ratios to vanilla by variant, one a repeat, and vanilla's median milliseconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steppers = {name: stepper(router, benchmark.batch, benchmark.length, device) for name, router in VARIANTS.items()}
    for step in steppers.values():
        for _ in range(3):
            step()
    order = random.Random(0)
    ratios: dict[str, list[float]] = {name: [] for name in VARIANTS}
    vanilla: list[float] = []
    for _ in track(range(benchmark.repeats), "repeats"):
        paired: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(benchmark.pairs):
            seconds = {}
            for name in order.sample(list(VARIANTS), len(VARIANTS)):
                begin = time.perf_counter()
                steppers[name]()
                seconds[name] = time.perf_counter() - begin
            vanilla.append(seconds["softmax"])
            for name, value in seconds.items():
                paired[name].append(value / seconds["softmax"])
        for name, values in paired.items():
            ratios[name].append(statistics.median(values))
    for method in ("ssr-l", "ssr-s"):
        for p in PROBABILITIES:
            softmax, sinkhorn = ratios[f"{method}, softmax step"], ratios[f"{method}, Sinkhorn step"]
            mixed = [(1 - p) * one + p * other for one, other in zip(softmax, sinkhorn, strict=True)]
            ratios[f"{method} at p = {p:g}"] = mixed
    return ratios, 1e3 * statistics.median(vanilla)


def main() -> None:
    benchmark = tyro.cli(Benchmark)
    torch.set_num_threads(benchmark.threads)
    ratios, milliseconds = measure(benchmark)
    about = {**machine(), "threads": benchmark.threads}
    console = Console()
    table = Table(
        title=f"Step time relative to vanilla ({milliseconds:.1f} ms; {benchmark.batch} × {benchmark.length} bytes)",
        caption=f"{about['gpu'] or about['cpu']}, {benchmark.threads} threads, torch {about['torch']}; "
        f"{benchmark.repeats} repeats of {benchmark.pairs} alternating steps",
    )
    for column in ("router", "median", "smallest", "largest"):
        table.add_column(column, justify="left" if column == "router" else "right")
    for name, values in ratios.items():
        table.add_row(name, *(f"{value:.3f}" for value in (statistics.median(values), min(values), max(values))))
    console.print(table)
    if benchmark.out:
        settings = {"repeats": benchmark.repeats, "pairs": benchmark.pairs, "batch": benchmark.batch}
        content = {"machine": about, "settings": settings, "vanilla_ms": milliseconds, "ratios": ratios}
        write_json(json.loads(json.dumps(content)), Path(benchmark.out))


if __name__ == "__main__":
    main()
