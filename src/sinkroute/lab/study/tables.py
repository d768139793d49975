"""The tables of a comparison, and what they say in words.

A table has the methods of one heading, which differ in nothing else; between tables nothing is ranked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.text import Text

from sinkroute.lab.study.arrange import describe
from sinkroute.lab.study.comparison import BILLION, Against, Entry
from sinkroute.lab.study.metric import METRICS, Metric, capital
from sinkroute.lab.study.results import Results
from sinkroute.lab.study.statistics import Estimate
from sinkroute.lab.study.table import Cell, Column, Row, Table, mark_best, plain

__all__ = ["all_tables", "markdown", "mode_table", "print_results", "sentences", "size_tables", "trend_table"]

_NOTHING = "–"
# Which columns a narrow terminal keeps, by the end of the metric's key.
_MATTERS = {"max_vio": 5, "ms_per_step": 1, "peak_memory_mb": 0, "dead": 2, "sinkhorn_steps": 1}


def all_tables(found: Results) -> list[tuple[str, Table]]:
    """Every table that there is, with its title, which is empty where there is one heading only."""
    out = size_tables(found)
    if (modes := mode_table(found)) is not None:
        out.append(("Served otherwise: the same models by noisy top-k, by the plan, or by both", modes))
    if (trends := trend_table(found)) is not None:
        title = f"Gain in {found.headline.title} over {found.reference}, by size (positive is better)"
        out.append((title, trends))
    return out


def size_tables(found: Results) -> list[tuple[str, Table]]:
    """A table for each heading under which something has been run."""
    return [(_title(found, size), table) for size in found.sizes if (table := _size_table(found, size)) is not None]


def _size_table(found: Results, size: str) -> Table | None:
    methods = [method for method in found.methods if found.has_row(size, method)]
    if not methods:
        return None
    head = found.headline
    alone = all(found.counts(size, method) == (1, 1) for method in methods)
    columns = [] if alone else [Column("n", "n", "Seeds that are done.", matters=6)]
    columns += [
        Column("headline", head.title, _help(found, head), head.lower_is_better and head.ranked, 10),
    ]
    told = [found.entries[size, method, head.key].against for method in methods]
    if any(told):
        words = f"Difference of runs that share a seed with one of {found.reference}."
        columns.append(Column("against", f"against\n{found.reference}", words, matters=9))
    if any(each is not None and each.p_corrected is not None for each in told):
        columns += _TESTS
        if found.margin is not None:
            words = f"Of the hypothesis that the difference is {found.margin:g} or more, corrected as p is."
            columns.append(Column("equivalent", f"p (TOST,\n±{found.margin:g})", words, matters=6))
    for metric in found.metrics[1:]:
        if metric.timed and _times(found):
            continue  # only what was measured in turn can be compared
        best = metric.lower_is_better and metric.ranked
        matters = _MATTERS.get(metric.key.rpartition(".")[2], 3)
        columns.append(Column(metric.key, metric.title, _help(found, metric), best, matters))
    if times := _times(found):
        words = f"A training step, timed in turn with the other methods', relative to {times['baseline']}; median."
        columns.append(Column("ratio", "time of\na step", words, True, 3))
    rows = mark_best(columns, [_row(found, size, method, columns) for method in methods])
    for name, bits in describe(found.baselines):
        cells = [Cell(f"{bits:.3f}", bits) if column.key == "headline" else Cell(_NOTHING) for column in columns]
        rows.append(Row(name, "baseline", tuple(cells)))
    return Table(tuple(columns), tuple(rows))


_TESTS = [
    Column("p", "p (Holm)", "Of the paired t-test, corrected for all methods and sizes.", matters=8),
    Column(
        "flip",
        "p (sign\nflips)",
        "Of the sign-flip test, which assumes no normal distribution; not corrected.",
        matters=6,
    ),
    Column(
        "detectable",
        "detectable\n(80 %)",
        "The true difference that one test finds in four of five studies.",
        matters=6,
    ),
    Column("verdict", "verdict", "By the corrected p.", matters=7),
]


def mode_table(found: Results) -> Table | None:
    """Other ways of serving against plain top-k of the same models; None without any."""
    if not found.modes:
        return None
    digits = found.headline.digits
    columns = (
        Column("value", found.headline.title, "Served in this way.", matters=10),
        Column("against", "against\nplain top-k", "Of the same trained models.", matters=9),
        *_TESTS,
        Column("max_vio", "serving MaxVio", "In this way of serving."),
    )
    rows = []
    for each in found.modes:
        cells = _tests(each.against, digits, found.headline)
        cells |= {"value": _estimate(each.value, digits), "max_vio": _estimate(each.max_vio, 2)}
        label = f"{each.size} {each.method}, {each.mode}".strip()
        rows.append(Row(label, "method", tuple(cells.get(column.key, Cell(_NOTHING)) for column in columns)))
    return Table(columns, tuple(rows))


def trend_table(found: Results) -> Table | None:
    """Gain per doubling of the active parameters, and where the line would be at 10⁹; None for one size."""
    if not found.trends:
        return None
    columns = (
        Column("pairs", "pairs", "Pairs of runs that share size and seed."),
        Column("slope", "gain per\ndoubling", "Slope of the line over log2 of the active parameters.", matters=9),
        Column("p", "p (slope)", "Of no trend; not corrected.", matters=8),
        Column("line", "at 10⁹ active:\nthe line", "With its 95 % interval, as far as the line holds."),
        Column("pair", "at 10⁹ active:\na new pair", "With its 95 % prediction interval."),
    )
    rows = []
    for each in found.trends:
        line, digits = each.line, found.headline.digits
        value, of_line, of_pair = line.at(math.log2(BILLION))
        texts = (
            str(line.n),
            line.slope.text(digits + 1, sign=True),
            _chance(line.p),
            Estimate(value, of_line, line.n).text(digits, sign=True),
            Estimate(value, of_pair, line.n).text(digits, sign=True),
        )
        rows.append(Row(each.method, "method", tuple(map(Cell, texts))))
    return Table(columns, tuple(rows))


def markdown(found: Results) -> str:
    """Tables and notes, to paste into a document."""
    lines = [line for title, table in all_tables(found) for line in table.markdown(title)]
    return "\n".join([*lines, *(f"- {plain(note)}" for note in found.notes)]) + "\n"


def print_results(found: Results, console: Console) -> None:
    """Tables, what they say, and the notes."""
    for title, table in all_tables(found):
        if title:
            console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(table)
    for sentence in sentences(found):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"- {note}", style="dim", highlight=False, markup=False, soft_wrap=True)


def sentences(found: Results) -> list[str]:
    """What came out, in words; nothing is said across headings."""
    out = []
    if found.plan is None and len(found.sizes) > 1:
        out.append(
            f"These runs differ in more than router and seed, so they stand in {len(found.sizes)} tables by what "
            "differs, and none is compared across them."
        )
    for size in found.sizes:
        told = _said(found, size)
        out += [f"{size}: {told[0]}", *told[1:]] if size and told else told
    return out or ["No run has finished yet, so there is nothing to compare."]


def _said(found: Results, size: str) -> list[str]:
    head = found.headline
    entries = [found.entries[size, method, head.key] for method in found.methods if found.has_row(size, method)]
    means = {entry.method: entry.estimate.mean for entry in entries if entry.estimate is not None}
    if not means:
        if any(found.counts(size, entry.method)[0] for entry in entries):
            return [f"Every finished run diverged: no {head.title} is finite."]
        return []
    out = []
    printed = {method: f"{mean:.{head.digits}f}" for method, mean in means.items()}
    best = printed[(min if head.lower_is_better else max)(means, key=lambda method: means[method])]
    first = [method for method, text in printed.items() if text == best]
    if len(means) == 1:
        out.append(f"Only {first[0]} has finished: {head.title} {best}.")
    elif head.ranked:
        has = "has" if len(first) == 1 else "have"
        out.append(f"{_join(first)} {has} the {'lowest' if head.lower_is_better else 'highest'} {head.title}: {best}.")
    against = [entry for entry in entries if entry.against is not None]
    tested = [entry for entry in against if entry.against is not None and entry.against.p_corrected is not None]
    if tested and head.ranked:
        by: dict[str, list[str]] = {}
        for entry in tested:
            by.setdefault(entry.against.verdict, []).append(entry.method)  # type: ignore[union-attr]
        parts = [f"{verdict}: {_join(by[verdict])}" for verdict in sorted(by)]
        out.append(f"Against {found.reference}, paired by seed and corrected: {'; '.join(parts)}.")
    elif against and head.ranked:
        parts = [
            f"{entry.method} {entry.against.paired.difference.text(head.digits, sign=True)}"
            for entry in against
            if entry.against is not None
        ]
        out.append(f"Against {found.reference}: {', '.join(parts)}.")
    even = {
        entry.method: entry.estimate.mean
        for (place, _, key), entry in found.entries.items()
        if (place, key) == (size, "serving.max_vio") and entry.estimate is not None
    }
    if len(even) > 1 and head.key != "serving.max_vio":
        low = min(even, key=lambda method: even[method])
        out.append(f"{low} serves with the most even load (MaxVio {even[low]:.2f}).")
    for name, bits in describe(found.baselines)[-1:]:  # the strongest n-gram comes last
        below = sum(mean < bits for mean in means.values())
        many = {0: "No method is", len(means): "Every finished method is"}.get(below, f"{below} of {len(means)} are")
        out.append(f"{many} below the {name} model ({bits:.3f}).")
    return out


def _row(found: Results, size: str, method: str, columns: Sequence[Column]) -> Row:
    done, planned = found.counts(size, method)
    entry, head = found.entries[size, method, found.headline.key], found.headline
    cells = {"n": Cell(f"{done}" if done == planned else f"{done} of {planned}")}
    cells["headline"] = _estimate(entry.estimate, head.digits)
    if method == found.reference:
        cells |= {column.key: Cell("") for column in _TESTS} | {"against": Cell("reference"), "equivalent": Cell("")}
    elif entry.against is not None:
        cells |= _tests(entry.against, head.digits, head)
    for metric in found.metrics[1:]:
        cells[metric.key] = _metric_cell(found, found.entries[size, method, metric.key])
    if times := _times(found):
        ratios = times["ratios"].get(method)
        if ratios:
            value = statistics.median(ratios)
            first = f"{times['milliseconds']:.0f} ms"
            cells["ratio"] = Cell(first if method == times["baseline"] else f"{value:.2f}×", value)
    runs = found.runs_of(size, method)
    failed = sum(run.state.kind == "failed" for run in runs)
    tags = [f"{failed} failed"] if failed else []
    tags += [
        f"seed {run.seed} {run.tag}" if len(runs) > 1 else run.tag
        for run in runs
        if run.tag and run.state.kind != "failed" and (found.plan is None or run.diverged_at is not None)
    ]
    return Row(method, "method", tuple(cells.get(column.key, Cell(_NOTHING)) for column in columns), tuple(tags))


def _tests(against: Against, digits: int, metric: Metric) -> dict[str, Cell]:
    """The cells about a difference."""
    test, better = against.paired, against.verdict == "better" and metric.ranked
    return {
        "against": Cell(test.difference.text(digits, sign=True), test.difference.mean, better),
        "p": Cell(_chance(against.p_corrected)),
        "flip": Cell(_chance(test.p_flip)),
        "detectable": Cell(_NOTHING if test.detectable is None else f"{test.detectable:.{digits}f}"),
        "equivalent": Cell(_chance(against.p_equivalent)),
        "verdict": Cell(against.verdict if metric.ranked else "not compared", best=better),
    }


def _metric_cell(found: Results, entry: Entry) -> Cell:
    cell = _estimate(entry.estimate, entry.metric.digits)
    runs = [run for run in found.runs_of(entry.size, entry.method) if run.finished]
    last = entry.metric.key.rpartition(".")[2]
    if last == "dead" and entry.estimate and (experts := runs[0].value("serving", "experts")):
        whole = f"{entry.estimate.mean:.0f}" if entry.estimate.half is None else cell.text
        return replace(cell, text=f"{whole} (of {experts:.0f})")
    if last == "sinkhorn_steps" and runs and (chance := runs[0].value("probability")) is not None:
        return replace(cell, text=f"{cell.text} (p={chance:g})")
    loads = [load for run in runs for load in run.load_average or ()]
    if entry.metric.timed and loads:
        return replace(cell, text=f"{cell.text} (load {min(loads):.1f} to {max(loads):.1f})")
    return cell


def _estimate(estimate: Estimate | None, digits: int) -> Cell:
    return Cell(_NOTHING) if estimate is None else Cell(estimate.text(digits), estimate.mean)


def _chance(p: float | None) -> str:
    return _NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _times(found: Results) -> Mapping[str, Any]:
    times = found.baselines.get("step_times")
    return times if isinstance(times, Mapping) else {}


def _help(found: Results, metric: Metric) -> str:
    """What a column means; of an attack with its options, which are what its entry has beside a clean one's numbers."""
    where, _, last = metric.key.rpartition(".")
    if last not in METRICS or not where.startswith(("valid", "attacked.")):
        return metric.about
    quality, attack = METRICS[last], where.removeprefix("attacked.")
    if where == "valid":
        return f"{capital(quality.name)} over every validation {quality.item}."
    results = [run.result for run in found.runs if run.result and attack in (run.result.get("attacked") or {})]
    entry, clean = (results[0]["attacked"][attack], results[0].get("valid") or {}) if results else ({}, {})
    options = {key: value for key, value in entry.items() if key not in clean}
    what, kind = "images" if quality.item == "image" else "text", attack.partition("@")[0]  # fgsm@2 is a kind of fgsm
    return f"{capital(quality.name)} on {what} under the {kind} attack{_how(options)}."


def _how(options: Mapping[str, Any]) -> str:
    """The options of an attack in brackets.

    >>> _how({"rate": 0.025}), _how({"epsilon": 2, "steps": 10}), _how({})
    (' (2.5% of the words)', ' (epsilon=2, steps=10)', '')
    """
    if set(options) == {"rate"} and isinstance(options["rate"], (int, float)):
        return f" ({options['rate']:.1%} of the words)"
    return f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""


def _title(found: Results, size: str) -> str:
    if not size:
        return ""
    active, total = found.parameters(size), found.parameters(size, "total")
    return f"{size}: {total:,} parameters, {active:,} active" if active and total else size


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
