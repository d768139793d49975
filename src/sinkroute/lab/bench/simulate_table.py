"""`sinkroute bench --simulate`: the step of each method on so many ranks, and its loss at equal time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console

from sinkroute._errors import unknown_name
from sinkroute.lab.bench.options import Bench
from sinkroute.lab.bench.simulate import MACHINES, Machine, StepTime, balanced, quality, step_time
from sinkroute.lab.bench.trace import Trace, read_traces
from sinkroute.lab.files import write_json
from sinkroute.lab.screen import Column, ScreenTable

__all__ = ["run_simulation"]

FREE = "perfect balance, free"


def run_simulation(bench: Bench, console: Console) -> int:
    """Read, simulate, show, and write what was shown as JSON; the exit code.

    Raises:
        ValueError: an unknown machine, ranks below 1, traces of different experts, no loads.
        FileNotFoundError: no such trace.
    """
    machine = _machine(bench.machine)
    runs: dict[str, list[Trace]] = {}
    read = read_traces(bench.simulate)
    finished = [trace for trace in read if trace.lines[-1].step >= trace.total_steps]
    for trace in finished or read:
        runs.setdefault(trace.name, []).append(trace)
    every = [trace for several in runs.values() for trace in several]
    sizes = {(trace.experts, trace.top_k, trace.total_steps) for trace in every}
    if len(sizes) > 1:
        told = "; ".join(f"{experts} experts top-{k}, {steps} steps" for experts, k, steps in sorted(sizes))
        raise ValueError(f"the traces are of different trainings ({told}): give those of one size at a time")
    runs = {FREE: [balanced(every[0])], **runs}
    times = {
        ranks: {name: [step_time(each, bench.mixture, machine, ranks) for each in own] for name, own in runs.items()}
        for ranks in bench.ranks
    }
    one_each = [ranks for ranks in bench.ranks if math.gcd(ranks, every[0].experts) == every[0].experts]
    shown = (one_each or bench.ranks)[0]
    console.print(_steps(times), _parts(shown, times[shown], runs, bench, machine), sep="\n")
    timed = {
        name: own for name, own in runs.items() if all(line.loss is not None for each in own for line in each.lines)
    }
    if timed:
        seconds = {name: _mean(times[bench.ranks[-1]][name], "seconds") for name in timed}
        console.print(_quality(timed, seconds, bench.ranks[-1]))
    left = f"{len(read) - len(every)} runs that are not finished are left out." if len(every) < len(read) else ""
    for note in [*_notes(every, machine, bench), *([left] if left else [])]:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)
    path = Path(bench.out if bench.out != Bench.out else "runs/bench/simulated.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        str(ranks): {name: [asdict(time) | {"seconds": time.seconds} for time in own] for name, own in each.items()}
        for ranks, each in times.items()
    }
    content = {"machine": asdict(machine), "mixture": asdict(bench.mixture), "traces": list(bench.simulate)}
    write_json(content | {"steps": figures}, path)
    console.print(f"Figures: [bold]{path}[/]", highlight=False, soft_wrap=True)
    return 0


def _machine(name: str) -> Machine:
    if name == "this-machine":
        from sinkroute.lab.bench.this_machine import measure_machine

        return measure_machine()
    if name not in MACHINES:
        raise unknown_name("machine", name, [*MACHINES, "this-machine"])
    return MACHINES[name]


def _mean(times: Sequence[StepTime], key: str) -> float:
    return float(np.mean([getattr(time, key) for time in times]))


def _steps(times: Mapping[int, Mapping[str, Sequence[StepTime]]]) -> ScreenTable:
    heads = [f"{ranks:,}\nrank{'s' * (ranks > 1)}" for ranks in times]
    table = _table("A training step, relative to perfect balance that costs nothing", heads)
    for name in next(iter(times.values())):
        row = [_mean(each[name], "seconds") / _mean(each[FREE], "seconds") for each in times.values()]
        table.add(name, *(f"{value:.3f}" for value in row))
    return table


def _parts(
    ranks: int, times: Mapping[str, Sequence[StepTime]], runs: Mapping[str, list[Trace]], bench: Bench, machine: Machine
) -> ScreenTable:
    """Where the time goes, in milliseconds."""
    heads = ["slowest", "experts", "exchange", "router", "update", "rest"]
    whole = all(line.max_vio_L is not None for own in runs.values() for trace in own for line in trace.lines)
    single = math.gcd(ranks, runs[FREE][0].experts) == runs[FREE][0].experts and whole
    more = ["dropped"] * (bench.mixture.capacity is not None) + ["single\nsteps"] * single
    table = _table(f"The parts of a step on {ranks:,} ranks, ms", [*heads, *more])
    for name, own in times.items():
        row = [f"{_mean(own, 'slowest'):.2f}"] + [f"{1e3 * _mean(own, key):.3g}" for key in heads[1:]]
        row += [f"{_mean(own, 'dropped'):.2%}"] * (bench.mixture.capacity is not None)
        if single:
            exact = [step_time(each, bench.mixture, machine, ranks, single_steps=True) for each in runs[name]]
            row.append(f"{_mean(exact, 'slowest'):.2f}")
        table.add(name, *row)
    return table


def _quality(runs: Mapping[str, list[Trace]], seconds: Mapping[str, float], ranks: int) -> ScreenTable:
    found = quality(runs, seconds)
    heads = ["runs", "all steps,\ns", "loss\nthen", "loss at\nequal time", "s to the\nslowest's loss"]
    table = _table(f"Training loss against simulated time on {ranks:,} ranks", heads)
    for name, row in found.items():
        reach = "never" if row["reach"] is None else f"{row['reach']:.3g}"
        cells = [str(len(runs[name])), f"{row['time']:.3g}", f"{row['final']:.4f}", f"{row['equal']:.4f}", reach]
        table.add(name, *cells)
    return table


def _table(title: str, heads: Sequence[str]) -> ScreenTable:
    return ScreenTable([Column("method", words=True), *map(Column, heads)], title=title)


def _notes(traces: Sequence[Trace], machine: Machine, bench: Bench) -> list[str]:
    tokens = np.mean([line.load_LE[0].sum() / line.steps / trace.top_k for trace in traces for line in trace.lines])
    steps = max(trace.steps_a_line for trace in traces)
    out = [
        f"Simulated, not measured: {machine.name}, {machine.flops / 1e12:.3g} TFLOP/s, "
        f"{machine.memory / 1e9:,.4g} GB/s of memory, links of {machine.link / 1e9:.3g} GB/s, "
        f"{machine.network / 1e9:.3g} GB/s between nodes of {machine.node}; the formulas are in "
        "sinkroute.lab.bench.simulate.",
        f"Loads are shares of {tokens:,.0f} tokens a step, scaled to {bench.mixture.tokens:,} a rank.",
    ]
    if steps > 1:
        out.append(
            f"A line of these logs is the sum of {steps} steps: the slowest rank is that of the sum, which is too low "
            "by what moves from step to step. The slowest of single steps is known where each rank has one expert, and "
            "is too high for a large batch by what is chance in so few tokens. Every step: train.log_every=1."
        )
    if bench.mixture.capacity is not None:
        out.append("Losses are those of the runs as they were trained, not with this capacity.")
    if any(trace.lines[0].loss is not None for trace in traces):
        out.append(
            "At equal time a slower method is looked at before its learning rate has come down; trained for fewer "
            "steps from the start it would do better."
        )
    return out
