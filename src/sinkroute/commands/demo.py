"""`sinkroute demo`: a comparison whose runs are trained one after another, and its report."""

from __future__ import annotations

import tyro
from rich.console import Console

__all__ = ["run"]


def run(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.config import find_preset, read_yaml
    from sinkroute.lab.study.demo import DemoConfig, run_demo

    # Another comparison of the same kind may stand first: a preset or a YAML file with `methods`.
    named = bool(arguments) and not arguments[0].startswith("-")
    preset = read_yaml(DemoConfig, find_preset(arguments[0] if named else "demo"))
    options = arguments[1:] if named else arguments
    return run_demo(tyro.cli(DemoConfig, default=preset, args=options, prog="sinkroute demo"), console)
