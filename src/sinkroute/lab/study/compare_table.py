"""The table of a comparison, for the terminal, for Markdown and for the page: the same cells everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sinkroute.lab.study.results import BILLION, Entry, Results
from sinkroute.lab.study.statistics import Estimate
from sinkroute.lab.study.table import Cell, Column, Row, Table

__all__ = ["SizeTable", "all_tables", "markdown", "mode_table", "number", "size_tables", "trend_table"]

_NOTHING = "–"


@dataclass(frozen=True)
class SizeTable:
    """The methods at one size; `title` is empty where there is one size only."""

    title: str
    table: Table


def size_tables(found: Results) -> list[SizeTable]:
    """A table for each size at which something has been run."""
    head, reference = found.headline, found.reference
    columns = (
        Column("n", "n", "Seeds that are done."),
        Column("headline", head.title, head.key),
        Column("against", f"against\n{reference}", f"Difference of runs that share a seed with one of {reference}."),
        Column("p", "p (Holm)", "Of the paired t-test, corrected for all methods and sizes."),
        Column("verdict", "verdict", "By the corrected p."),
        *(Column(metric.key, metric.title, metric.key) for metric in found.metrics[1:]),
    )
    out = []
    for size in found.sizes:
        rows = [row for method in found.methods if (row := _row(found, size, method)) is not None]
        if rows:
            out.append(SizeTable(_title(found, size), Table(columns, tuple(rows), (), ())))
    return out


def mode_table(found: Results) -> Table | None:
    """Other ways of serving against plain top-k of the same models; None without any."""
    if not found.modes:
        return None
    head = found.headline
    columns = (
        Column("value", head.title, "Served in this way."),
        Column("against", "against\nplain top-k", "Of the same trained models."),
        Column("p", "p (Holm)", "Of the paired t-test, corrected for all methods, sizes and modes."),
        Column("verdict", "verdict", "By the corrected p."),
        Column("max_vio", "serving MaxVio", "In this way of serving."),
    )
    rows = []
    for each in found.modes:
        p = each.against.p_corrected
        texts = (
            number(each.value, head.digits),
            number(each.against.paired.difference, head.digits, sign=True),
            _NOTHING if p is None else _p(p),
            each.against.verdict,
            number(each.max_vio, 2),
        )
        cells = tuple(
            Cell(text, best=place in (1, 3) and each.against.verdict == "better") for place, text in enumerate(texts)
        )
        rows.append(Row(f"{each.size} {each.method}, {each.mode}".strip(), "method", cells))
    return Table(columns, tuple(rows), (), ())


def all_tables(found: Results) -> list[tuple[str, Table]]:
    """Every table that there is, with its title."""
    out = [(each.title, each.table) for each in size_tables(found)]
    if (modes := mode_table(found)) is not None:
        out.append(("Served otherwise: the same models by noisy top-k, by the plan, or by both", modes))
    if (trends := trend_table(found)) is not None:
        title = f"Gain in {found.headline.title} over {found.reference}, by size (positive is better)"
        out.append((title, trends))
    return out


def trend_table(found: Results) -> Table | None:
    """Gain per doubling of the active parameters, and where the line would be at 10⁹; None for one size."""
    if not found.trends:
        return None
    columns = (
        Column("pairs", "pairs", "Pairs of runs that share size and seed."),
        Column("slope", "gain per\ndoubling", "Slope of the line over log2 of the active parameters."),
        Column("p", "p (slope)", "Of no trend; not corrected."),
        Column("line", "at 10⁹ active:\nthe line", "With its 95 % interval, as far as the line holds."),
        Column("pair", "at 10⁹ active:\na new pair", "With its 95 % prediction interval."),
    )
    rows = []
    for each in found.trends:
        line, digits = each.line, found.headline.digits
        value, of_line, of_pair = line.at(math.log2(BILLION))
        texts = (
            str(line.n),
            number(line.slope, digits + 1, sign=True),
            _NOTHING if line.p is None else _p(line.p),
            number(Estimate(value, of_line, line.n), digits, sign=True),
            number(Estimate(value, of_pair, line.n), digits, sign=True),
        )
        rows.append(Row(each.method, "method", tuple(map(Cell, texts))))
    return Table(columns, tuple(rows), (), ())


def markdown(found: Results) -> str:
    """Tables and notes, to paste into a document."""
    out = []
    for title, table in all_tables(found):
        out += _markdown_table(title, table)
    out += [f"- {_plain(note)}" for note in found.notes]
    return "\n".join(out) + "\n"


def number(found: Estimate | None, digits: int, sign: bool = False) -> str:
    """
    >>> number(Estimate(1.23456, 0.01, 3), 3), number(Estimate(-0.5, None, 1), 2, sign=True)
    ('1.235 ± 0.010', '-0.50')
    """
    if found is None:
        return _NOTHING
    mean = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    return mean if found.half is None else f"{mean} ± {found.half:.{digits}f}"


def _row(found: Results, size: str, method: str) -> Row | None:
    done, planned = found.counts(size, method)
    failed = sum(run.state.kind == "failed" for run in found.runs if (run.size, run.label) == (size, method))
    if not done and not failed:
        return None  # not begun; the notes count it
    entries = [found.entries[size, method, metric.key] for metric in found.metrics]
    texts = (
        f"{done}" if done == planned else f"{done} of {planned}",
        _cell(entries[0]),
        *_against(entries[0], method == found.reference),
        *map(_cell, entries[1:]),
    )
    verdict = "" if entries[0].against is None else entries[0].against.verdict
    row = tuple(Cell(text, best=place in (2, 4) and verdict == "better") for place, text in enumerate(texts))
    return Row(method, "method", row, (f"{failed} failed",) if failed else (), done)


def _cell(entry: Entry) -> str:
    return number(entry.estimate, entry.metric.digits)


def _against(entry: Entry, is_reference: bool) -> tuple[str, str, str]:
    if is_reference:
        return "reference", "", ""
    if entry.against is None:
        return _NOTHING, _NOTHING, _NOTHING
    p = entry.against.p_corrected
    difference = number(entry.against.paired.difference, entry.metric.digits, sign=True)
    return difference, _NOTHING if p is None else _p(p), entry.against.verdict


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _title(found: Results, size: str) -> str:
    if not size:
        return ""
    active, total = found.parameters(size), found.parameters(size, "total")
    return f"{size}: {total:,} parameters, {active:,} active" if active and total else size


def _markdown_table(title: str, table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(_plain, cells)) + " |"

    rows = [line([", ".join([row.label, *row.tags]), *(cell.text for cell in row.cells)]) for row in table.rows]
    head = [line(["method", *(column.title for column in table.columns)]), "|---" * (len(table.columns) + 1) + "|"]
    return [*([f"**{_plain(title)}**", ""] if title else []), *head, *rows, ""]


def _plain(text: str) -> str:
    """Text that Markdown does not read as anything else.

    >>> _plain("a|b")
    'a\\\\|b'
    """
    return "".join(f"\\{letter}" if letter in "|`*_<[]\\" else letter for letter in text.replace("\n", " "))
