"""Everything that a comparison has found, gathered from the folders of its runs; what the table and the page show.

A number is taken only from a run that is done under the hash that the comparison demands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sinkroute.lab.config import to_mapping
from sinkroute.lab.machine import machine
from sinkroute.lab.study.cells import Cell, Plan
from sinkroute.lab.study.state import State, check_data, read_record, read_result, read_state
from sinkroute.lab.study.statistics import (
    LEVEL,
    Estimate,
    Paired,
    Trend,
    estimate,
    holm,
    paired,
    trend,
    verdict,
)

__all__ = ["BILLION", "Against", "Entry", "Metric", "Mode", "Results", "SizeTrend", "dig", "gather"]

BILLION = 1e9
"""Active parameters for which the trend over sizes is asked."""

# Last part of a dotted key → (decimals, name in a heading).
_KINDS = {
    "bits_per_byte": (3, "bits/byte"),
    "bits_per_symbol": (3, "bits/symbol"),
    "perplexity": (2, "perplexity"),
    "error": (2, "error %"),
    "max_vio": (2, "MaxVio"),
    "max_vio_batch": (2, "MaxVio (batches)"),
    "ms_per_step": (1, "ms/step"),
    "peak_memory_mb": (0, "peak MB"),
    "dead": (1, "dead experts"),
    "sinkhorn_steps": (0, "Sinkhorn steps"),
    "dropped": (4, "share dropped"),
    "steps_to_balance": (1, "steps to balance"),
    "censored": (2, "share never balanced"),
}
_HIGHER = ("entropy", "tokens_per_second")


@dataclass(frozen=True)
class Metric:
    """A number of `result.json`, by its dotted key, with its heading and the decimals that are shown."""

    key: str
    title: str
    digits: int
    lower_is_better: bool

    @classmethod
    def of(cls, key: str) -> Metric:
        """
        >>> Metric.of("attacked.word-swap@2.5%.perplexity").title
        'word-swap@2.5% perplexity'
        >>> Metric.of("inference.noise.serving.max_vio").title
        'inference by noise: serving MaxVio'
        >>> Metric.of("switch.steps_to_balance").title
        'after the switch: steps to balance'
        """
        *where, last = key.split(".")
        digits, name = _KINDS.get(last, (3, last.replace("_", " ")))
        prefix = ""
        if where[:1] == ["inference"] and len(where) > 1:
            prefix, where = f"inference by {where[1]}: ", where[2:]
        if where[:1] == ["attacked"]:
            where = where[1:]
        place = {"train": "training", "switch": "after the switch:"}.get(".".join(where), ".".join(where))
        if last == "ms_per_step":
            place = ""
        return cls(key, f"{prefix}{place} {name}".replace("  ", " ").strip(), digits, last not in _HIGHER)


@dataclass(frozen=True)
class Against:
    """An entry against the reference; `p_corrected` by Holm over all methods and sizes of the metric."""

    paired: Paired
    p_corrected: float | None
    verdict: str


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
        plan: what was asked for.
        states: of every cell, by name.
        records: under which code and on which machine cells were run, by name.
        results: of the cells that are done, by name.
        metrics: the headline first.
        entries: by (size, method, key of the metric).
        family: how many tests of the headline metric were corrected together.
        modes: other ways of serving, where they were measured.
        trends: over sizes, where there are several.
        notes: how to read it all, and what is missing.
    """

    plan: Plan
    states: Mapping[str, State]
    records: Mapping[str, Mapping[str, Any]]
    results: Mapping[str, Mapping[str, Any]]
    metrics: tuple[Metric, ...]
    entries: Mapping[tuple[str, str, str], Entry]
    family: int
    modes: tuple[Mode, ...]
    trends: tuple[SizeTrend, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def headline(self) -> Metric:
        return self.metrics[0]

    @property
    def seconds(self) -> float:
        """Of all processes that ran cells, data and evaluation included."""
        return math.fsum(float(record.get("seconds", 0.0)) for record in self.records.values())

    def counts(self, size: str, method: str) -> tuple[int, int]:
        """Runs that are done, and runs that are planned."""
        cells = [cell for cell in self.plan.cells if (cell.size, cell.method) == (size, method)]
        return sum(cell.name in self.results for cell in cells), len(cells)

    def parameters(self, size: str, kind: str = "active") -> int | None:
        """Of the reference at a size, or of the first method that has been run there."""
        cells = [cell for cell in self.plan.cells if cell.size == size and cell.name in self.results]
        cells.sort(key=lambda cell: cell.method != self.plan.reference)
        return dig(self.results[cells[0].name], f"parameters.{kind}") if cells else None

    def json(self) -> dict[str, Any]:
        """Everything, as `results.json` holds it."""
        plan = self.plan
        return {
            "title": plan.title,
            "question": plan.compare.question,
            "file": plan.path.name,
            "compare": asdict(plan.compare),
            "overrides": dict(plan.overrides),
            "reference": plan.reference,
            "machine": machine(),
            "seconds": self.seconds,
            "cells": [self._cell(cell) for cell in plan.cells],
            "metrics": [asdict(metric) for metric in self.metrics],
            "correction": {"method": "Holm", "level": LEVEL, "family": "all methods and sizes of a metric"},
            "statistics": [_entry(entry) for entry in self.entries.values()],
            "modes": [asdict(each) for each in self.modes],
            "trends": [_trend(each) for each in self.trends],
            "notes": list(self.notes),
        }

    def _cell(self, cell: Cell) -> dict[str, Any]:
        state = self.states[cell.name]
        result = dict(self.results.get(cell.name, {}))
        if "serving" in result:  # the loads of all experts are in the run's own folder
            result["serving"] = {key: value for key, value in result["serving"].items() if key != "load"}
        if "inference" in result:
            result["inference"] = {
                mode: found | {"serving": {key: value for key, value in found["serving"].items() if key != "load"}}
                for mode, found in result["inference"].items()
            }
        return {
            "name": cell.name,
            "size": cell.size,
            "method": cell.method,
            "family": cell.family,
            "point": dict(cell.point),
            "seed": cell.seed,
            "hash": cell.hash,
            "state": state.kind,
            "note": state.note,
            "config": to_mapping(cell.config),
            "record": dict(self.records[cell.name]),
            "result": result or None,
        }


def gather(plan: Plan) -> Results:
    """Read what is there and compare it.

    Raises:
        ValueError: a result is not what its run wrote, or runs were trained on different data.
    """
    states = {cell.name: read_state(cell, plan.out) for cell in plan.cells}
    records = {cell.name: read_record(cell, plan.out) for cell in plan.cells}
    results = {cell.name: read_result(cell, plan.out) for cell in plan.cells if states[cell.name].kind == "done"}
    check_data([cell for cell in plan.cells if cell.name in results], plan.out)
    metrics = tuple(map(Metric.of, plan.compare.metrics or _default_metrics(plan, results)))
    entries = {
        (size, method, metric.key): _read_entry(plan, results, size, method, metric)
        for size in plan.sizes
        for method in plan.methods
        for metric in metrics
    }
    family = 0
    for metric in metrics:
        tests = _compare(plan, entries, metric)
        family = tests if metric is metrics[0] else family
    trends = _trends(plan, results, entries, metrics[0])
    modes = _modes(plan, results, metrics[0])
    found = Results(plan, states, records, results, metrics, entries, family, modes, trends)
    return Results(**{**vars(found), "notes": tuple(_notes(found))})


def dig(result: Any, key: str) -> Any:
    """A value by its dotted key, of which a part may itself have dots (an attack at a rate of 2.5 %); None without.

    >>> dig({"attacked": {"word-swap@2.5%": {"error": 3}}}, "attacked.word-swap@2.5%.error")
    3
    """
    if not key:
        return result
    if not isinstance(result, Mapping):
        return None
    parts = key.split(".")
    for count in range(1, len(parts) + 1):
        head = ".".join(parts[:count])
        if head in result and (found := dig(result[head], ".".join(parts[count:]))) is not None:
            return found
    return None


def _default_metrics(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    headline = next((result["metric"] for result in results.values() if "metric" in result), "bits_per_byte")
    out = [f"valid.{headline}"]
    settings = [cell.config.eval for cell in plan.cells]
    out += [f"attacked.{name}.{headline}" for name in dict.fromkeys(name for one in settings for name in one.attacks)]
    models, data = [cell.config.model for cell in plan.cells], [cell.config.data for cell in plan.cells]
    if any(getattr(model, "capacity", None) is not None for model in models):
        out.append("train.dropped")
    if any(one.switch_to is not None for one in data):
        out += ["switch.steps_to_balance", "switch.loss"]
    return [*out, "serving.max_vio", "train.max_vio", "train.ms_per_step"]


def _read_entry(plan: Plan, results: Mapping[str, Mapping[str, Any]], size: str, method: str, metric: Metric) -> Entry:
    values = {}
    for cell in plan.cells:
        if (cell.size, cell.method) == (size, method) and cell.name in results:
            value = _number(results[cell.name], metric.key)
            if value is not None:
                values[cell.seed] = value
    return Entry(size, method, metric, values, estimate(list(values.values())) if values else None)


def _compare(plan: Plan, entries: dict[tuple[str, str, str], Entry], metric: Metric) -> int:
    """Pair one metric's entries with the reference and correct for their number, which is returned."""
    found: dict[tuple[str, str, str], Paired] = {}
    for size in plan.sizes:
        reference = entries[size, plan.reference, metric.key]
        for method in plan.methods:
            entry = entries[size, method, metric.key]
            common = [seed for seed in entry.values if seed in reference.values]
            if method != plan.reference and common:
                differences = [entry.values[seed] - reference.values[seed] for seed in common]
                found[size, method, metric.key] = paired(differences)
    tested = {key: each.p for key, each in found.items() if each.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    for key, each in found.items():
        p = corrected.get(key)
        against = Against(each, p, verdict(each.difference.mean, p, metric.lower_is_better))
        entries[key] = Entry(**{**vars(entries[key]), "against": against})
    return len(tested)


def _modes(plan: Plan, results: Mapping[str, Mapping[str, Any]], metric: Metric) -> tuple[Mode, ...]:
    """Other ways of serving, paired with the plain one of the very same trained models."""
    found: list[tuple[tuple[str, str, str], list[float], list[float], list[float]]] = []
    for size, method in dict.fromkeys((cell.size, cell.method) for cell in plan.cells):
        cells = [cell for cell in plan.cells if (cell.size, cell.method) == (size, method) and cell.name in results]
        for mode in dict.fromkeys(mode for cell in cells for mode in cell.config.eval.inference):
            pairs, loads = [], []
            for cell in cells:
                result = results[cell.name]
                plain, other = _number(result, metric.key), _number(result, f"inference.{mode}.{metric.key}")
                if plain is not None and other is not None:
                    pairs.append((plain, other))
                    load = _number(result, f"inference.{mode}.serving.max_vio")
                    loads += [] if load is None else [load]
            if pairs:
                others = [other for _, other in pairs]
                found.append(((size, method, mode), others, [other - plain for plain, other in pairs], loads))
    tests = [paired(differences) for _, _, differences, _ in found]
    told = [test.p for test in tests if test.p is not None]
    corrected = iter(holm(told))
    out = []
    for (key, others, _, loads), test in zip(found, tests, strict=True):
        p = None if test.p is None else next(corrected)
        against = Against(test, p, verdict(test.difference.mean, p, metric.lower_is_better))
        out.append(Mode(*key, estimate(others), estimate(loads) if loads else None, against))
    return tuple(out)


def _number(result: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a result; None without one."""
    value = dig(result, key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def _trends(
    plan: Plan,
    results: Mapping[str, Mapping[str, Any]],
    entries: Mapping[tuple[str, str, str], Entry],
    metric: Metric,
) -> tuple[SizeTrend, ...]:
    active = {
        (cell.size, cell.method): dig(results[cell.name], "parameters.active")
        for cell in plan.cells
        if cell.name in results
    }
    out = []
    for method in plan.methods:
        points = []
        for size in plan.sizes:
            entry, reference = entries[size, method, metric.key], entries[size, plan.reference, metric.key]
            if entry.against is None or not active.get((size, method)):
                continue
            sign = 1 if metric.lower_is_better else -1
            points += [
                (active[size, method], seed, sign * (reference.values[seed] - value))
                for seed, value in entry.values.items()
                if seed in reference.values
            ]
        line = trend([math.log2(count) for count, _, _ in points], [gain for _, _, gain in points])
        if line is not None:
            out.append(SizeTrend(method, tuple(points), line))
    return tuple(out)


def _notes(found: Results) -> list[str]:
    plan, headline = found.plan, found.headline
    if not found.results:
        return ["No run is done yet, so there is nothing to compare."]
    pairs = [
        entry.against.paired.difference.n
        for entry in found.entries.values()
        if entry.metric == headline and entry.against is not None
    ]
    out = [
        f"± is half of the 95 % t-interval over the seeds that are done. Differences to {plan.reference} are of runs "
        "that share a seed (data order, initial weights)."
    ]
    if found.family:
        out.append(
            f"p is of the paired t-test, two-sided, corrected by Holm for the {found.family} "
            f"comparison{'s' if found.family > 1 else ''} of a metric (all methods"
            + (" at all sizes" if len(plan.sizes) > 1 else "")
            + f"); better or worse: p < {LEVEL}. Intervals of differences are not corrected."
        )
    few = sorted({n for n in pairs if 2 <= n <= 5})
    if few:
        least = ", ".join(f"{2 / 2**n:g} with {n} seeds" for n in few)
        out.append(
            f"The exact sign-flip test, which assumes no normal distribution, cannot get below p = {least}: with so "
            "few seeds what is told apart rests on the t-test's assumption."
        )
    if any(n == 1 for n in pairs):
        out.append("With one seed there is neither interval nor test: differences may be chance.")
    out += _missing(found)
    out += _mixed(found)
    return out


def _missing(found: Results) -> list[str]:
    """Which runs are not in the numbers, and why."""
    out = []
    for cell in found.plan.cells:
        state = found.states[cell.name]
        if state.kind == "failed":
            out.append(f"{cell.name} failed and is not in the numbers: {state.note}")
    kinds = [state.kind for state in found.states.values()]
    waiting = len(kinds) - kinds.count("done") - kinds.count("failed")
    if waiting:
        out.append(f"{waiting} of {len(kinds)} runs are not done yet; n counts those that are.")
    for entry in found.entries.values():
        done, _ = found.counts(entry.size, entry.method)
        if entry.metric == found.headline and len(entry.values) < done:
            who = f"{entry.size} {entry.method}".strip()
            out.append(f"{who}: {done - len(entry.values)} of {done} runs have no finite {entry.metric.title}.")
    return out


def _mixed(found: Results) -> list[str]:
    """In what the runs differ beside what is compared."""
    out = []
    done = [found.records[name] for name in found.results]

    def several(*keys: str) -> list[str]:
        return sorted({" ".join(str(record.get(key)) for key in keys) for record in done})

    if len(versions := several("sinkroute", "commit")) > 1:
        out.append(f"The runs come from different versions of the code: {', '.join(versions)}.")
    if len(machines := several("cpu", "gpu", "torch")) > 1:
        out.append(f"The runs come from different machines or versions of torch: {', '.join(machines)}.")
    if len(loads := several("jobs", "threads")) > 1 or any(record.get("jobs", 1) != 1 for record in done):
        told = ", ".join("{} at a time with {} threads".format(*load.split()) for load in loads)
        out.append(f"Times per step were measured while other runs shared the machine ({told}): they say little.")
    return out


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
