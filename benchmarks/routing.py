"""Time and memory of every router's forward and backward pass, relative to plain top-k; see `sinkroute.lab.bench`.

    python benchmarks/routing.py [--quick] [--sizes 4096x16x2 ...] [--no-peers] [--out FILE.json]

`sinkroute bench` is the same for any machine. This adds the routers of other packages, as far as their environments
are there (see `benchmarks/routing_peers.py`), and writes the project's own figures. What the file holds already is not
measured again.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from routing_peers import measure_peers
from sinkroute.lab.bench import Bench, run_bench
from sinkroute.lab.files import write_json


@dataclass
class Benchmark(Bench):
    __doc__ = Bench.__doc__

    out: str = "benchmarks/results/routing.json"
    """Where the figures are written, as JSON."""
    peers: bool = True
    """Other packages' routers, too."""


def main() -> int:
    benchmark = tyro.cli(Benchmark)
    console = Console()
    code = run_bench(benchmark, console)
    if code or not benchmark.peers:
        return code
    path = Path(benchmark.out)
    content = json.loads(path.read_text(encoding="utf-8"))
    peers = content.setdefault("peers", {})
    try:
        measure_peers(peers, console.print, seconds=min(benchmark.seconds, 10), seed=benchmark.seed)
    except KeyboardInterrupt:
        code = 130
    finally:
        write_json(content, path)
    for package, sizes in peers.items():
        for size, figures in sizes.items():
            console.print(peer_table(package, size, figures))
    return code


def peer_table(package: str, size: str, figures: dict[str, Any]) -> Table:
    """One package's routers and ours, relative to our softmax."""
    gate = ", each with its gate" if package == "transformers" else ""
    table = Table(title=f"{figures['version']} (*) at {size}{gate}; our softmax takes {figures['softmax_ms']:.4g} ms")
    for column in ("router", "time", "smallest", "largest"):
        table.add_column(column, justify="left" if column == "router" else "right")
    for name, values in figures["ratios"].items():
        table.add_row(name, *(f"{value:.3f}" for value in (statistics.median(values), min(values), max(values))))
    return table


if __name__ == "__main__":
    sys.exit(main())
