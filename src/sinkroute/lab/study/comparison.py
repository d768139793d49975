"""Methods against a reference: from a long frame of numbers to estimates, paired tests, and trends over sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from sinkroute.lab.study.metric import Metric, number_at
from sinkroute.lab.study.runs import Run
from sinkroute.lab.study.statistics import LEVEL, Estimate, Paired, Trend, holm, paired, trend, verdict

__all__ = ["BILLION", "Against", "Entry", "Mode", "SizeTrend", "compare_metric", "compare_modes", "trends_over_size"]

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


def compare_metric(
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


def compare_modes(runs: Sequence[Run], metric: Metric) -> tuple[Mode, ...]:
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


def trends_over_size(
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
