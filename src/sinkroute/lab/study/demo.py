"""`sinkroute demo`: a study whose runs are trained one after another in this process, with steps timed in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from sinkroute.lab.bench import measure_steps
from sinkroute.lab.config import VisionConfig, to_mapping
from sinkroute.lab.data import Corpus
from sinkroute.lab.files import write_json
from sinkroute.lab.interrupt import Interrupted, StopRequest, stop_on_signal
from sinkroute.lab.machine import machine
from sinkroute.lab.ngram import ngram_bits_per_byte
from sinkroute.lab.study.cells import Plan, select
from sinkroute.lab.study.check import check_cells
from sinkroute.lab.study.display import CompareDisplay
from sinkroute.lab.study.metric import dig
from sinkroute.lab.study.page import write_picture
from sinkroute.lab.study.pool import run_here
from sinkroute.lab.study.results import gather
from sinkroute.lab.study.run import commit, missing_cells, tell, write_plan
from sinkroute.lab.study.runs import read_json
from sinkroute.lab.study.state import check_folders
from sinkroute.lab.study.worker import load_cell_data

__all__ = ["run_demo"]


def run_demo(plan: Plan, console: Console, *, only: Sequence[str] = (), fresh: bool = False) -> int:
    """Run what is missing of a plan of one size; what failed before is tried again.

    Returns:
        The exit code of the command: 0, 1 if a method failed, or 130 if it was interrupted.

    Raises:
        ValueError: an unknown method, several sizes, data that are not there, or a folder that holds runs with another
            configuration.
    """
    if len(plan.sizes) > 1:
        raise ValueError(f"demo trains models of one size, and {plan.path} has {len(plan.sizes)}; sinkroute compare it")
    cells = tuple(select(plan, only))
    there = [cell.method for cell in cells]
    plan = replace(plan, cells=cells, reference=plan.reference if plan.reference in there else there[0])
    check_folders([] if fresh else cells, plan.out)
    check_cells(cells, "--data.path PATH")
    states, missing = missing_cells(plan, cells, fresh=fresh, retry=True)
    plan.out.mkdir(parents=True, exist_ok=True)
    data, steps = load_cell_data(cells[0].config), cells[0].config.train.steps
    size = f" ({len(data.train):,} bytes to train on)" if _has_bytes(data) else ""
    console.print(
        f"[bold]sinkroute demo[/]: {len(cells)} runs of {steps} steps on {data.name}{size} → {escape(str(plan.out))}",
        highlight=False,
        soft_wrap=True,
    )
    at = {cell.name: states[cell.name].step for cell in missing}
    with stop_on_signal() as stop, CompareDisplay(console, missing, at, lines=True) as display:
        about = {**_yardsticks(data), "machine": machine(), "order": [cell.name for cell in cells]}
        if times := _step_times(plan, display, stop):
            about["step_times"] = times
        write_json(about, plan.out / "baselines.json")
        write_plan(plan)
        told = {"commit": commit(), "jobs": 1}
        run_here(missing, plan.out, fresh=fresh, about=told, stop=stop, listen=display.listen)
    found = gather(plan)
    tell(found, console)
    if any(run.state.kind != "waiting" for run in found.runs):
        write_picture(found, plan.out / "demo.png")
    if stop:
        console.print("[yellow]Interrupted[/]: the report shows what is there, and the same command continues.")
        return 130
    return int(any(run.state.kind == "failed" for run in found.runs))


def _step_times(plan: Plan, display: CompareDisplay, stop: StopRequest) -> dict[str, Any]:
    """A training step of each method, timed in turn: milliseconds of the first, ratios to it of all.

    What an earlier call has measured of these runs stays. Nothing of an interrupted measurement is kept.
    """
    configs = {cell.method: cell.config for cell in reversed(plan.cells)}
    configs = {method: configs[method] for method in plan.methods}
    settings = {name: to_mapping(config) for name, config in configs.items()}
    for setting in settings.values():
        del setting["seed"]
    with contextlib.suppress(OSError, ValueError):
        known = dig(read_json(plan.out / "baselines.json"), "step_times") or {}
        if known.get("settings") == settings:
            return dict(known)
    first = next(iter(configs))
    if isinstance(configs[first].model, VisionConfig):
        return {}

    def pause() -> None:
        if stop:
            raise Interrupted("stopped")

    display.say(f"timing a step of {len(configs)} methods in turn")
    with torch.random.fork_rng(), contextlib.suppress(Interrupted):
        found = measure_steps(configs, first, repeats=5, seconds=30, pause=pause)
        display.say(f"a step of {first}: {found.milliseconds:.0f} ms")
        return {"baseline": first, "milliseconds": found.milliseconds, "ratios": found.ratios, "settings": settings}
    return {}


def _has_bytes(data: Any) -> bool:
    return isinstance(data, Corpus) and data.vocabulary is None


def _yardsticks(data: Any) -> dict[str, Any]:
    """n-gram models of a text of bytes, and where it comes from."""
    if not _has_bytes(data):
        return {}
    before = bytes(data.train[-2:])
    bits = {
        name: {"bits_per_byte": ngram_bits_per_byte(data.train, data.valid, n, before)}
        for name, n in (("bigram", 2), ("trigram", 3))
    }
    sizes = {split: len(getattr(data, split)) for split in ("train", "valid", "test")}
    return {**bits, "corpus": {"name": data.name, "source": data.source, "sha256": data.sha256, **sizes}}
