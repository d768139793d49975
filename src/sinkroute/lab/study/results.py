"""Everything that runs have found, compared: what tables, figures and the page show.

Runs come from a plan (`gather`) or from folders that somebody names (`compare_runs`). Their numbers are one long frame,
a row for each (size, method, seed, metric), and every comparison is made from it, once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd

from sinkroute.lab.machine import machine
from sinkroute.lab.study.arrange import arrange, read_baselines
from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.comparison import (
    BILLION,
    Entry,
    Mode,
    SizeTrend,
    compare_metric,
    compare_modes,
    trends_over_size,
)  # fmt: skip
from sinkroute.lab.study.metric import Metric, Quality, dig, number_at
from sinkroute.lab.study.notes import notes_of
from sinkroute.lab.study.runs import Group, Run, common_metric, group_runs, planned_runs
from sinkroute.lab.study.statistics import LEVEL, Blocks, blocks

__all__ = ["Results", "compare_runs", "gather"]


@dataclass(frozen=True)
class Results:
    """See the module.

    Attributes:
        title: of the page.
        question: that the comparison is to answer; may be empty.
        runs: all of them, those of a plan that are not begun too.
        reference: the method that the others are compared with.
        metrics: the headline first.
        frame: columns size, method, seed, metric (its key), value; finite numbers of finished runs.
        entries: by (size, method, key of the metric).
        family: how many tests of the headline metric were corrected together.
        modes: other ways of serving, where they were measured.
        trends: over sizes, where there are several.
        baselines: n-gram models, text and machine, and times of a step that were measured in turn.
        plan: what was asked for; None for runs that somebody named.
        notes: how to read it all, and what is missing.
    """

    title: str
    question: str
    runs: tuple[Run, ...]
    reference: str
    metrics: tuple[Metric, ...]
    frame: pd.DataFrame
    entries: Mapping[tuple[str, str, str], Entry]
    family: int
    modes: tuple[Mode, ...]
    trends: tuple[SizeTrend, ...]
    baselines: Mapping[str, Any]
    plan: Plan | None = None
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def sizes(self) -> list[str]:
        """In the order of the runs; in each, runs differ in nothing but what their method and seed are."""
        return list(dict.fromkeys(run.size for run in self.runs))

    @cached_property
    def methods(self) -> list[str]:
        """In the order of the runs; a method has the same ink everywhere, by its place here."""
        return list(dict.fromkeys(run.label for run in self.runs))

    @property
    def routers(self) -> list[str]:
        """The router of each method, in the order of `methods`."""
        first = {run.label: run.method for run in reversed(self.runs)}
        return [first[label] for label in self.methods]

    @property
    def points(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Method → its family (the name in the study's file) and its point of that family's grid."""
        cells = () if self.plan is None else self.plan.cells
        return {cell.method: (cell.family, cell.point) for cell in cells}

    @property
    def headline(self) -> Metric:
        return self.metrics[0]

    @property
    def quality(self) -> Quality:
        """What all these runs are measured in."""
        return common_metric([run for run in self.runs if run.finished] or self.runs)

    @property
    def margin(self) -> float | None:
        """Within which methods count as equivalent in the headline metric."""
        return _margin(self.plan, self.headline)

    def blocks(self, size: str) -> Blocks | None:
        """The two-way model of the headline metric at a size, of the seeds that all methods have."""
        rows = self.frame[(self.frame["size"] == size) & (self.frame.metric == self.headline.key)]
        return blocks(rows.pivot(index="method", columns="seed", values="value").dropna(axis="columns").to_numpy())

    @property
    def seconds(self) -> float:
        """Of all processes that ran cells, data and evaluation included."""
        return math.fsum(float(run.record.get("seconds", 0.0)) for run in self.runs)

    def groups(self, size: str) -> list[Group]:
        """The methods at one size, with the runs that are begun."""
        begun = [run for run in self.runs if run.size == size and run.state.kind != "waiting"]
        return group_runs(begun, self.methods)

    def runs_of(self, size: str, method: str) -> list[Run]:
        """The runs of a method at a size, of all seeds."""
        return [run for run in self.runs if (run.size, run.label) == (size, method)]

    def counts(self, size: str, method: str) -> tuple[int, int]:
        """Runs that are done, and runs that are planned."""
        runs = self.runs_of(size, method)
        return sum(run.finished for run in runs), len(runs)

    def parameters(self, size: str, kind: str = "active") -> int | None:
        """Of the reference at a size, or of the first method that has been run there."""
        runs = [run for run in self.runs if run.size == size and run.finished]
        runs.sort(key=lambda run: run.label != self.reference)
        return dig(runs[0].result, f"parameters.{kind}") if runs else None

    def has_row(self, size: str, method: str) -> bool:
        """Whether tables show it; of a plan, what is not begun is only counted."""
        return any(run.finished or run.state.kind == "failed" or not self.plan for run in self.runs_of(size, method))

    def json(self) -> dict[str, Any]:
        """Everything, as `results.json` holds it."""
        about = {} if self.plan is None else {"file": self.plan.path.name, "compare": asdict(self.plan.study),
                                              "overrides": dict(self.plan.overrides)}  # fmt: skip
        return {
            "title": self.title,
            "question": self.question,
            **about,
            "reference": self.reference,
            "machine": machine(),
            "seconds": self.seconds,
            "cells": [_cell(self, run) for run in self.runs],
            "metrics": [asdict(metric) for metric in self.metrics],
            "correction": {"method": "Holm", "level": LEVEL, "family": "all methods and sizes of a metric"},
            "statistics": [_entry(entry) for entry in self.entries.values()],
            "blocks": {size: asdict(each) for size in self.sizes if (each := self.blocks(size)) is not None},
            "modes": [asdict(each) for each in self.modes],
            "trends": [_trend(each) for each in self.trends],
            "baselines": dict(self.baselines),
            "notes": list(self.notes),
        }


def gather(plan: Plan) -> Results:
    """Read what there is of a plan and compare it.

    Raises:
        ValueError: a result is not what its run wrote, or runs were trained on different data.
    """
    runs, study = planned_runs(plan), plan.study
    keys = study.metrics or _default_metrics(runs)
    baselines = read_baselines(None, [run for run in runs if run.state.kind != "waiting"])
    return _results(plan.title, study.question, runs, plan.reference, keys, baselines, [], plan)


def compare_runs(
    runs: Sequence[Run], title: str = "sinkroute report", baselines: Mapping[str, Any] | None = None
) -> Results:
    """Compare runs as `read_runs` returns them, the first plain softmax among them as the reference.

    Runs that differ in anything but router, label and seed stand under headings that say so, each compared within its
    heading only.

    Raises:
        ValueError: no runs, or runs that are not measured alike.
    """
    common_metric(runs)
    runs, notes = arrange(runs)
    plain = [run.label for run in runs if run.method == "softmax"]
    more = [key for key in ("serving.dead", "sinkhorn_steps") if any(run.value(key) is not None for run in runs)]
    keys = [*_default_metrics(runs), *more, "train.peak_memory_mb"]
    known = read_baselines(baselines, runs)
    return _results(title, "", runs, (plain or [runs[0].label])[0], keys, known, notes, None)


def _results(
    title: str, question: str, runs: Sequence[Run], reference: str, keys: Sequence[str], baselines: Mapping[str, Any],
    notes: Sequence[str], plan: Plan | None,
) -> Results:  # fmt: skip
    metrics = tuple(map(Metric.of, keys))
    rows = [
        (run.size, run.label, run.seed, metric.key, value)
        for run in runs
        for metric in metrics
        if (value := number_at(run.result, metric.key)) is not None and math.isfinite(value)
    ]
    frame = pd.DataFrame(rows, columns=["size", "method", "seed", "metric", "value"])
    sizes, methods = dict.fromkeys(run.size for run in runs), dict.fromkeys(run.label for run in runs)
    pairs = [(size, method) for size in sizes for method in methods]
    entries: dict[tuple[str, str, str], Entry] = {}
    for metric in metrics:
        margin = _margin(plan, metric) if metric is metrics[0] else None
        entries |= compare_metric(frame[frame.metric == metric.key], metric, pairs, reference, margin)
    # In the order of sizes and methods, as before there was a frame: `results.json` is read by people too.
    entries = {key: entries[key] for size, method in pairs for key in ((size, method, each.key) for each in metrics)}
    tests = [entries[size, method, metrics[0].key].against for size, method in pairs]
    family = sum(each is not None and each.p_corrected is not None for each in tests)
    modes, trends = compare_modes(runs, metrics[0]), trends_over_size(runs, entries, reference, metrics[0])
    found = Results(
        title, question, tuple(runs), reference, metrics, frame, entries, family, modes, trends, baselines, plan
    )
    return replace(found, notes=(*notes, *notes_of(found)))


def _margin(plan: Plan | None, metric: Metric) -> float | None:
    """What the study, or its primary comparison in this metric, names as the margin of equivalence."""
    if plan is None or plan.study.equivalence is not None:
        return None if plan is None else plan.study.equivalence
    primary = plan.study.primary
    return primary.equivalence if primary.metric in ("", metric.key) else None


def _default_metrics(runs: Sequence[Run]) -> list[str]:
    """Quality, attacked quality, what a capacity drops, what a change of the text does, balance, and time."""
    headline = next((str(run.result["metric"]) for run in runs if run.result and "metric" in run.result), None)
    headline = headline or common_metric(runs).key
    asked = [dig(run.config, "eval.attacks") or {} for run in runs]
    told = [(run.result or {}).get("attacked") or {} for run in runs]
    out = [f"valid.{headline}"]
    out += [f"attacked.{name}.{headline}" for name in dict.fromkeys(name for one in (*asked, *told) for name in one)]
    if any(dig(run.config, "model.capacity") is not None for run in runs):
        out.append("train.dropped")
    if any(dig(run.config, "data.switch_to") is not None for run in runs):
        out += ["switch.steps_to_balance", "switch.loss"]
    return [*out, "serving.max_vio", "train.max_vio", "train.ms_per_step"]


def _cell(found: Results, run: Run) -> dict[str, Any]:
    result = dict(run.result or {})
    if "serving" in result:  # the loads of all experts are in the run's own folder
        result["serving"] = _without_loads(result["serving"])
    if "inference" in result:
        result["inference"] = {
            mode: each | {"serving": _without_loads(each["serving"])} for mode, each in result["inference"].items()
        }
    family, point = found.points.get(run.label, (run.label, {}))
    return {
        "name": run.name,
        "size": run.size,
        "method": run.label,
        "family": family,
        "point": dict(point),
        "seed": run.seed,
        "hash": run.hash,
        "state": run.state.kind,
        "note": run.state.note,
        "config": dict(run.config),
        "record": dict(run.record),
        "result": result or None,
    }


def _without_loads(serving: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in serving.items() if key != "load"}


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "size": entry.size,
        "method": entry.method,
        "metric": entry.metric.key,
        "seeds": {str(seed): value for seed, value in entry.values.items()},
        "estimate": None if entry.estimate is None else asdict(entry.estimate),
        "against": None if entry.against is None else asdict(entry.against),
    }


def _trend(each: SizeTrend) -> dict[str, Any]:
    value, line, new = each.line.at(math.log2(BILLION))
    return {
        "method": each.method,
        "points": [{"active": active, "seed": seed, "gain": gain} for active, seed, gain in each.points],
        "line": asdict(each.line),
        "at_1e9": {"gain": value, "half_of_the_line": line, "half_of_a_new_pair": new},
    }
