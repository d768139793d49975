"""`sinkroute compare`: methods × sizes × seeds."""

from __future__ import annotations

import tyro
from rich.console import Console

__all__ = ["run"]


def run(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.study.run import CompareCommand, run_compare

    return run_compare(tyro.cli(CompareCommand, args=arguments, prog="sinkroute compare"), console)
