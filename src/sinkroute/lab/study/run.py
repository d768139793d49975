"""`sinkroute compare`: run what is missing, then say what came out."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import sinkroute
from sinkroute.lab.config import parse_scalar, preset_folder
from sinkroute.lab.files import write_json, write_text
from sinkroute.lab.interrupt import stop_on_signal
from sinkroute.lab.study.cells import Cell, Plan, expand, parse_overrides, select
from sinkroute.lab.study.check import check_cells
from sinkroute.lab.study.config import find_study, read_study
from sinkroute.lab.study.display import CompareDisplay
from sinkroute.lab.study.options import CompareCommand
from sinkroute.lab.study.page import write_page
from sinkroute.lab.study.pool import run_cells
from sinkroute.lab.study.results import Results, gather
from sinkroute.lab.study.state import State, check_folders, read_state
from sinkroute.lab.study.tables import markdown, print_results

__all__ = ["commit", "missing_cells", "run_compare", "tell", "write_plan"]


def run_compare(command: CompareCommand, console: Console) -> int:
    """Do it; returns the exit code of the command: 0, 1 if a run failed, or 130 if it was interrupted.

    Raises:
        ValueError: a wrong configuration, data that are not there, or a folder with results of another configuration.
        WorkerError: the workers do not start.
    """
    for name in ("jobs", "threads"):
        if (value := getattr(command, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be 1 or more, got {value}")
    if command.fresh and (command.list or command.report):
        raise ValueError("--fresh runs everything anew; leave it out to look at what is there")
    path = find_study(command.config)
    overrides = parse_overrides([word for words in command.set for word in words])
    plan = expand(path, read_study(path), out=command.out, seeds=command.seeds, overrides=overrides)
    if command.power:
        _power(plan, command.earlier, console)
        return 0
    chosen = select(plan, command.only, command.sizes_only)
    check_folders([cell for cell in plan.cells if not (command.fresh and cell in chosen)], plan.out)
    if command.list:
        console.print(_listing(plan, chosen))
        return 0
    if command.submit and not command.report:
        _submit(command, plan, chosen, console)
        return 0
    interrupted = not command.report and _run(command, plan, chosen, console)
    found = gather(plan)
    tell(found, console, [Path(command.markdown)] if command.markdown else [])
    if interrupted:
        console.print("[yellow]Interrupted[/]: the same command continues from the last checkpoints.", soft_wrap=True)
        return 130
    return int(any(run.state.kind == "failed" for run in found.runs))


def _power(plan: Plan, earlier: Sequence[str], console: Console) -> None:
    from sinkroute.lab.study.power import power_tables, read_sources

    results = preset_folder().parent / "benchmarks" / "results" / "study"
    tables, notes = power_tables(plan, read_sources(earlier or [results]))
    console.print(f"[bold]{escape(plan.title)}[/]", *tables, sep="\n", highlight=False)
    for note in notes:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)


def tell(found: Results, console: Console, targets: Sequence[Path] = ()) -> None:
    """Print what there is of a plan, and write it into the folder of its runs: JSON, Markdown, page."""
    print_results(found, console)
    if found.plan is not None and found.plan.out.is_dir():
        out = found.plan.out
        write_json(found.json(), out / "results.json")
        for path in (out / "table.md", *targets):
            write_text(markdown(found), path)
        page = write_page(found, out / "report.html")
        console.print(f"Report: [bold]{escape(str(page))}[/] (open it in a browser)", highlight=False, soft_wrap=True)


def _run(command: CompareCommand, plan: Plan, chosen: Sequence[Cell], console: Console) -> bool:
    """Run what is missing; True if it was interrupted."""
    states, missing = missing_cells(plan, chosen, fresh=command.fresh, retry=command.retry)
    counts = Counter(state.kind for state in states.values())
    gpus = _gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = max(1, min(command.jobs or plan.study.jobs or len(gpus) or cores, len(missing)))
    threads = command.threads or max(1, cores // jobs)
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    console.print(
        f"[bold]{escape(plan.title)}[/]: {len(plan.methods)} methods × {len(plan.sizes)} sizes × "
        f"{len({cell.seed for cell in plan.cells})} seeds → {escape(str(plan.out))}; {told}; "
        f"{jobs} at a time with {threads} threads each" + (f" on {len(gpus)} GPUs" if gpus else ""),
        highlight=False,
        soft_wrap=True,
    )
    if not missing:
        return False
    check_cells(missing)
    plan.out.mkdir(parents=True, exist_ok=True)
    write_plan(plan)
    at = {cell.name: states[cell.name].step for cell in missing}
    with stop_on_signal() as stop, CompareDisplay(console, missing, at) as display:
        run_cells(
            missing,
            plan.out,
            jobs=jobs,
            threads=threads,
            gpus=gpus,
            fresh=command.fresh,
            about={"commit": commit(), "jobs": jobs},
            stop=stop,
            listen=display.listen,
        )
    return bool(stop)


def missing_cells(
    plan: Plan, chosen: Sequence[Cell], *, fresh: bool, retry: bool
) -> tuple[dict[str, State], list[Cell]]:
    """How far each run is, and which are to be run."""
    states = {cell.name: State("waiting") if fresh else read_state(cell, plan.out) for cell in chosen}
    over = ("done",) if retry else ("done", "failed")
    return states, [cell for cell in chosen if states[cell.name].kind not in over]


def _submit(command: CompareCommand, plan: Plan, chosen: Sequence[Cell], console: Console) -> None:
    """Hand what is missing to a cluster."""
    from sinkroute.lab.study.cluster import submit

    words = [option.partition("=") for several in command.submit_options for option in several]
    for name, equals, value in words:
        if not (name and equals and value):
            raise ValueError(f"--submit-options {name}{equals}{value} must be NAME=VALUE, such as timeout_min=600")
    options = {name: parse_scalar(value) for name, _, value in words}
    if command.jobs:
        options.setdefault("slurm_array_parallelism", command.jobs)
    _, missing = missing_cells(plan, chosen, fresh=command.fresh, retry=command.retry)
    check_cells(missing, data=False)
    plan.out.mkdir(parents=True, exist_ok=True)
    write_plan(plan)
    about = {"commit": commit(), "jobs": 1}
    ids = submit(missing, plan.out, command.submit or "", options, fresh=command.fresh, about=about) if missing else []
    console.print(
        f"{len(ids)} jobs submitted{': ' + ', '.join(ids[:3]) if ids else ''}{', …' if len(ids) > 3 else ''}. "
        "The same command with --list says how far they are, with --report what came out.",
        highlight=False,
        soft_wrap=True,
    )


def write_plan(plan: Plan) -> None:
    """`compare.json`: the study as it was read, and the hash that it demands of each run."""
    content = {
        "file": str(plan.path),
        "compare": asdict(plan.study),
        "overrides": dict(plan.overrides),
        "cells": {
            cell.name: {"size": cell.size, "method": cell.method, "seed": cell.seed, "hash": cell.hash}
            for cell in plan.cells
        },
    }
    write_json(content, plan.out / "compare.json")


def commit() -> str | None:
    """The commit of the code, where it lies in a checkout; "+" behind it if the code has been changed since."""
    source = Path(sinkroute.__file__).parent
    try:
        asked: dict[str, Any] = {"cwd": source, "capture_output": True, "text": True, "timeout": 20, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **asked).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", "."], **asked).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changed)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would call each GPU that this process may use."""
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return [visible[n] if n < len(visible) else str(n) for n in range(torch.cuda.device_count())]


def _listing(plan: Plan, cells: Sequence[Cell]) -> Table:
    table = Table(title=Text(f"{plan.title}: {len(cells)} runs in {plan.out}"), title_justify="left")
    for column in ("size", "method", "seed", "state"):
        table.add_column(column, overflow="fold")
    for cell in cells:
        state = read_state(cell, plan.out)
        steps = cell.config.train.steps
        words = {
            "done": "done",
            "waiting": "waiting",
            "failed": f"failed: {state.note}",
            "running": f"step {state.step} of {steps}, run by {state.note}",
            "unfinished": state.note or f"step {state.step} of {steps}",
        }[state.kind]
        style = {"done": "green", "failed": "red"}.get(state.kind, "")
        table.add_row(Text(cell.size), Text(cell.method), str(cell.seed), Text(words, style=style))
    return table
