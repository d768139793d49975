"""`sinkroute demo`: a comparison whose runs are trained one after another, and its report."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console

__all__ = ["run"]


def run(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.config import to_mapping
    from sinkroute.lab.study.config import common_config, find_study, read_study

    # Another study may stand first: a preset or a YAML file.
    named = bool(arguments) and not arguments[0].startswith("-")
    path = find_study(arguments[0] if named else "demo")
    study = read_study(path)
    common = common_config(study, path)

    def option(name: str, kind: Any, default: Any, words: str) -> tuple[str, Any, Any]:
        return name, Annotated[kind, tyro.conf.arg(help=words)], field(default_factory=lambda: default)

    sections = ("data", "model", "train", "eval")
    command = make_dataclass(
        "DemoCommand",
        [
            option("out", str, study.out or f"runs/{path.stem}", "Folder for runs and report."),
            option("seeds", tuple[int, ...], study.seeds, "A run per method and seed; three or more give intervals."),
            option("only", tuple[str, ...], (), "Just these methods; empty: all."),
            option("fresh", bool, False, "Delete earlier runs in the folder; otherwise they are kept or continued."),
            *(option(name, type(getattr(common, name)), getattr(common, name), "") for name in sections),
        ],
    )
    command.__doc__ = "Train one small sparse language model per routing method, evaluate, attack, and report."
    asked: Any = tyro.cli(command, args=arguments[1:] if named else arguments, prog="sinkroute demo")

    from sinkroute.lab.study.cells import expand, flat
    from sinkroute.lab.study.demo import run_demo

    overrides: dict[str, Any] = {}
    for name in sections:
        new = flat(to_mapping(getattr(asked, name)), f"{name}.")
        old = flat(to_mapping(getattr(common, name)), f"{name}.")
        overrides |= {key: value for key, value in new.items() if value != old.get(key)}
    plan = expand(path, study, out=asked.out, seeds=asked.seeds, overrides=overrides)
    return run_demo(plan, console, only=asked.only, fresh=asked.fresh)
