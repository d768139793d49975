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
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sinkroute.lab.bench import stepper
from sinkroute.lab.bench.timing import alternate, seconds_of
from sinkroute.lab.config import Config, DataConfig, RouterConfig, TrainConfig
from sinkroute.lab.files import write_json
from sinkroute.lab.machine import machine

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
    "loss-free": RouterConfig("loss-free"),
    "quantile": RouterConfig("quantile", {"ema": 0.9}),
    "ssr-dual": RouterConfig("ssr-dual"),
    "ssr-dual exact": RouterConfig("ssr-dual", {"exact": True}),
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


def measure(benchmark: Benchmark) -> tuple[dict[str, list[float]], float]:
    """Ratios to vanilla by variant, one a repeat, and vanilla's median milliseconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = Config(data=DataConfig(length=benchmark.length), train=TrainConfig(batch=benchmark.batch))
    steppers = {name: stepper(replace(base, router=router), device) for name, router in VARIANTS.items()}
    for step in steppers.values():
        for _ in range(3):
            step()
    found = alternate(
        [list(VARIANTS)] * benchmark.pairs,
        "softmax",
        lambda name: seconds_of(steppers[name], device),
        repeats=track(range(benchmark.repeats), "repeats"),
    )
    ratios = found.ratios
    for method in ("ssr-l", "ssr-s"):
        for p in PROBABILITIES:
            softmax, sinkhorn = ratios[f"{method}, softmax step"], ratios[f"{method}, Sinkhorn step"]
            mixed = [(1 - p) * one + p * other for one, other in zip(softmax, sinkhorn, strict=True)]
            ratios[f"{method} at p = {p:g}"] = mixed
    return ratios, found.milliseconds


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
