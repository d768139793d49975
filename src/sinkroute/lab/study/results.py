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
from sinkroute.lab.study.metric import Metric, Quality, dig, number_at
from sinkroute.lab.study.notes import notes_of
from sinkroute.lab.study.runs import Group, Run, common_metric, group_runs, planned_runs
from sinkroute.lab.study.statistics import LEVEL, Estimate, Paired, Trend, holm, paired, trend, verdict

__all__ = [
    "BILLION", "Against", "Entry", "Metric", "Mode", "Results", "SizeTrend", "compare_runs", "dig", "gather",
]  # fmt: skip

BILLION = 1e9
"""Active parameters for which the trend over sizes is asked."""


@dataclass(frozen=True)
class Against:
    """An entry against the reference; both corrected p by Holm over all methods and sizes of the metric."""

    paired: Paired
    p_corrected: float | None
    verdict: str
    p_equivalent: float | None = None


@dataclass(frozen=True)
class Entry:
    """One metric of one method at one size: its value by seed, the seeds that are done, and what follows."""

    size: str
    method: str
    metric: Metric
    values: Mapping[int, float]
    estimate: Estimate | None
    against: Against | None = None


@dataclass(frozen=True)
class Mode:
    """A method served otherwise than by plain top-k, against the same runs served plainly, in the headline metric.

    `value` is the quality of the mode, `max_vio` its MaxVio over the split; `p_corrected` is by Holm over all methods,
    sizes and modes.
    """

    size: str
    method: str
    mode: str
    value: Estimate
    max_vio: Estimate | None
    against: Against


@dataclass(frozen=True)
class SizeTrend:
    """How a method's paired gain in the headline metric changes with size.

    Attributes:
        method: which.
        points: (active parameters, seed, gain); positive gains are better than the reference.
        line: over log2 of the active parameters.
    """

    method: str
    points: tuple[tuple[int, int, float], ...]
    line: Trend


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

    @property
    def seconds(self) -> float:
        """Of all processes that ran cells, data and evaluation included."""
        return math.fsum(float(run.record.get("seconds", 0.0)) for run in self.runs)

    def groups(self, size: str) -> list[Group]:
        """The methods at one size, with the runs that are begun."""
        begun = [run for run in self.runs if run.size == size and run.state.kind != "waiting"]
        return group_runs(begun, self.methods)

    def counts(self, size: str, method: str) -> tuple[int, int]:
        """Runs that are done, and runs that are planned."""
        runs = [run for run in self.runs if (run.size, run.label) == (size, method)]
        return sum(run.finished for run in runs), len(runs)

    def parameters(self, size: str, kind: str = "active") -> int | None:
        """Of the reference at a size, or of the first method that has been run there."""
        runs = [run for run in self.runs if run.size == size and run.finished]
        runs.sort(key=lambda run: run.label != self.reference)
        return dig(runs[0].result, f"parameters.{kind}") if runs else None

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
        own = frame[frame.metric == metric.key]
        entries |= _compare(own, metric, pairs, reference, _margin(plan, metric) if metric is metrics[0] else None)
    # In the order of sizes and methods, as before there was a frame: `results.json` is read by people too.
    entries = {key: entries[key] for size, method in pairs for key in ((size, method, each.key) for each in metrics)}
    tests = [entries[size, method, metrics[0].key].against for size, method in pairs]
    family = sum(each is not None and each.p_corrected is not None for each in tests)
    modes, trends = _modes(runs, metrics[0]), _trends(runs, entries, reference, metrics[0])
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


def _compare(
    frame: pd.DataFrame, metric: Metric, pairs: Sequence[tuple[str, str]], reference: str, margin: float | None
) -> dict[tuple[str, str, str], Entry]:
    """One metric's entries, paired with the reference of their size by seed and corrected for their number."""
    wide = frame.pivot(index=["size", "method"], columns="seed", values="value")
    out, tests = {}, {}
    for size, method in pairs:
        values = wide.loc[size, method].dropna() if (size, method) in wide.index else pd.Series(dtype=float)
        own = {int(seed): float(value) for seed, value in values.items()}
        estimate = Estimate.of(list(own.values())) if own else None
        out[size, method, metric.key] = Entry(size, method, metric, own, estimate)
        if method != reference and (size, reference) in wide.index:
            apart = (values - wide.loc[size, reference]).dropna()
            if len(apart):
                tests[size, method, metric.key] = paired(apart.tolist(), margin)
    for key, against in _corrected(tests, metric).items():
        out[key] = replace(out[key], against=against)
    return out


def _corrected(tests: Mapping[Any, Paired], metric: Metric) -> dict[Any, Against]:
    """The tests of one family, with p-values corrected for their number, and what they say."""

    def correct(name: str) -> dict[Any, float]:
        told = {key: p for key, test in tests.items() if (p := getattr(test, name)) is not None}
        return dict(zip(told, holm(list(told.values())), strict=True))

    differ, equal = correct("p"), correct("p_equivalent")
    out = {}
    for key, test in tests.items():
        words = verdict(test.difference.mean, differ.get(key), metric.lower_is_better)
        if words == "not distinguishable" and equal.get(key, 1.0) < LEVEL:
            words = "equivalent"
        out[key] = Against(test, differ.get(key), words, equal.get(key))
    return out


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


def _modes(runs: Sequence[Run], metric: Metric) -> tuple[Mode, ...]:
    """Other ways of serving, paired with the plain one of the very same trained models."""
    rows = [
        (run.size, run.label, mode, value, value - plain, number_at(found, "serving.max_vio"))
        for run in runs
        for mode, found in ((run.result or {}).get("inference") or {}).items()
        if (value := number_at(found, metric.key)) is not None
        and (plain := number_at(run.result, metric.key)) is not None
        and math.isfinite(value - plain)
    ]
    frame = pd.DataFrame(rows, columns=["size", "method", "mode", "value", "apart", "max_vio"])
    of = dict(iter(frame.groupby(["size", "method", "mode"], sort=False)))
    told = _corrected({key: paired(each["apart"].tolist()) for key, each in of.items()}, metric)
    out = []
    for (size, method, mode), each in of.items():
        loads, served = each["max_vio"].dropna().tolist(), Estimate.of(each["value"].tolist())
        out.append(Mode(size, method, mode, served, Estimate.of(loads) if loads else None, told[size, method, mode]))
    return tuple(out)


def _trends(
    runs: Sequence[Run], entries: Mapping[tuple[str, str, str], Entry], reference: str, metric: Metric
) -> tuple[SizeTrend, ...]:
    active = {(run.size, run.label): int(count) for run in runs if (count := run.value("parameters", "active"))}
    points: dict[str, list[tuple[int, int, float]]] = {}
    for (size, method, key), entry in entries.items():
        if key != metric.key or entry.against is None or (size, method) not in active:
            continue
        other, sign = entries[size, reference, key].values, 1 if metric.lower_is_better else -1
        points.setdefault(method, []).extend(
            (active[size, method], seed, sign * (other[seed] - value))
            for seed, value in entry.values.items()
            if seed in other
        )
    lines = {
        method: trend([math.log2(count) for count, _, _ in own], [gain for _, _, gain in own])
        for method, own in points.items()
    }
    return tuple(SizeTrend(method, tuple(points[method]), line) for method, line in lines.items() if line is not None)


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
