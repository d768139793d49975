"""`sinkroute compare`: methods × sizes × seeds."""

from __future__ import annotations

import tyro
from rich.console import Console

from sinkroute.lab.study.options import CompareCommand

__all__ = ["run"]


def run(arguments: list[str], console: Console) -> int:
    command = tyro.cli(CompareCommand, args=arguments, prog="sinkroute compare")

    from sinkroute.lab.study.run import run_compare

    return run_compare(command, console)
