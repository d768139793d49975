"""`sinkroute bench`: what routers cost."""

from __future__ import annotations

import os

import tyro
from rich.console import Console

__all__ = ["run"]


def run(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.bench.options import Bench

    command = tyro.cli(Bench, args=arguments, prog="sinkroute bench")
    if command.simulate:
        from sinkroute.lab.bench.simulate_table import run_simulation

        return run_simulation(command, console)
    # torch's count of memory warns of tensors that it did not see made. To be set before torch is loaded.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from sinkroute.lab.bench import run_bench

    return run_bench(command, console)
