"""The one table, and the sentences that say what it shows.

Every number and every comparison is computed here, once, from the runs: the terminal and the page print the same cells.

Seeds: with three or more, a cell is mean ± half the 95 % t-interval, `t(0.975, n - 1) · s / √n`; with two it is
mean ± half the range; with one there is no interval, and the notes say that small differences may be chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from sinkroute.lab.study.metric import Quality as Metric
from sinkroute.lab.study.metric import capital
from sinkroute.lab.study.runs import Group, Run, common_metric, differences, group_runs, read_baselines

__all__ = ["Cell", "Column", "Row", "Spread", "Table", "describe", "result_table", "run_tag"]

#: t(0.975, df) for df = 1..30; beyond that the normal value is right to 2 %.
_T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
_T975 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]

_VANILLA = ("softmax", "vanilla")
_BALANCE = ("load-balance",)
_NOTHING = "–"


@dataclass(frozen=True)
class Spread:
    """Mean of `n` seeds and the half width printed behind ±; `half` is None for one seed or non-finite values.

    >>> Spread.of([1.0, 3.0])
    Spread(mean=2.0, half=1.0, n=2)
    >>> Spread.of([1.0])
    Spread(mean=1.0, half=None, n=1)
    """

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("values is empty; a spread needs at least one number.")
        n = len(values)
        mean = sum(values) / n
        if n == 1 or not all(map(math.isfinite, values)):
            return cls(mean, None, n)
        if n == 2:
            return cls(mean, (max(values) - min(values)) / 2, n)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
        t = _T975[n - 2] if n - 2 < len(_T975) else 1.960
        return cls(mean, t * deviation / math.sqrt(n), n)

    def text(self, digits: int) -> str:
        if not math.isfinite(self.mean):
            return str(self.mean)  # "nan" or "inf": a diverged method is shown as such
        middle = f"{self.mean:.{digits}f}"
        return middle if self.half is None else f"{middle} ± {self.half:.{digits}f}"


@dataclass(frozen=True)
class Column:
    """A column: its title, what it means, and whether its lowest value is the best one."""

    key: str
    title: str
    help: str
    lower_is_better: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell: what is printed, the number behind it (None for text and for nothing), and whether it is the best."""

    text: str
    value: float | None = None
    best: bool = False

    @property
    def main(self) -> str:
        """The text without what stands behind ± or in brackets."""
        return self.text.split(" ± ")[0].split(" (")[0]

    @property
    def detail(self) -> str:
        """What stands behind `main`: "± 0.004", "(p=0.1)" or nothing."""
        return self.text[len(self.main) :].strip()


@dataclass(frozen=True)
class Row:
    """A row; `kind` is "method" or "baseline", `tags` say what is special about it (interrupted, diverged)."""

    label: str
    kind: str
    cells: tuple[Cell, ...]
    tags: tuple[str, ...] = ()
    seeds: int = 0


@dataclass(frozen=True)
class Table:
    """The result table. `headline` says what won and where SSR stands; `notes` say how to read the numbers."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    headline: tuple[str, ...]
    notes: tuple[str, ...]

    def cell(self, label: str, key: str) -> Cell:
        """The cell of a row and a column, by label and column key.

        Raises:
            KeyError: there is no such row or column; the message lists those there are.
        """
        keys = [column.key for column in self.columns]
        if key not in keys:
            raise KeyError(f"no column {key!r}; known: {', '.join(keys)}")
        for row in self.rows:
            if row.label == label:
                return row.cells[keys.index(key)]
        raise KeyError(f"no row {label!r}; known: {', '.join(row.label for row in self.rows)}")

    def rich(self, title: str | None = None) -> RichTable:
        """The table for a terminal; best values are green and bold, headline and notes stand below.

        Cells are `Text`, never markup, so a label with square brackets is printed as it is. To print on a terminal that
        may be narrow, hand the `Table` itself to a rich console: it stacks the columns in as many tables as it takes.
        """
        return self._rich(range(len(self.columns)), title, said=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(max_width=10_000)
        left = list(range(len(self.columns)))
        while left:
            take = len(left)
            while take > 1 and self._width(left[:take], console, unlimited) > options.max_width:
                take -= 1
            yield self._rich(left[:take], None, said=False)
            left = left[take:]
        yield self._said()

    def _said(self) -> Text:
        return Text("\n".join((*self.headline, *self.notes)), style="dim", justify="left")

    def _width(self, which: Sequence[int], console: Console, unlimited: ConsoleOptions) -> int:
        """The width at which no cell of these columns has to break."""
        return Measurement.get(console, unlimited, self._rich(which, None, said=False)).maximum

    def _rich(self, which: Sequence[int], title: str | None, said: bool) -> RichTable:
        # A baseline has nothing to say in a stack without its one column.
        shown = [row for row in self.rows if row.kind == "method" or any(row.cells[c].value is not None for c in which)]
        table = RichTable(
            title=None if title is None else Text(title),
            box=box.SIMPLE_HEAD,
            caption=self._said() if said else None,
            caption_justify="left",
            padding=(0, 1, 0, 0),
        )
        labels = []
        for row in shown:
            label = Text(row.label, style="italic" if row.kind == "baseline" else "")
            for tag in row.tags:
                label.append(f"\n{tag}", style="yellow")
            labels.append(label)
        table.add_column(Text("method"), min_width=min(22, max(len(row.label) for row in self.rows)))
        for c in which:
            texts = [self.columns[c].title, *(f"{row.cells[c].main}\n{row.cells[c].detail}" for row in shown)]
            width = max(len(line) for text in texts for line in text.split("\n"))
            table.add_column(Text(self.columns[c].title), justify="right", min_width=width)
        for row, label in zip(shown, labels, strict=True):
            cells = [row.cells[c] for c in which]
            table.add_row(label, *map(_printed, cells))
        return table


def _printed(cell: Cell) -> Text:
    text = Text(cell.main, style="bold green" if cell.best else "")
    if cell.detail:
        text.append(f"\n{cell.detail}", style="not bold dim")
    return text


def result_table(runs: Sequence[Run], baselines: Mapping[str, Any] | None = None) -> Table:
    """The table of all methods, with the sentences that go with it.

    Args:
        runs: as `read_runs` returns them; those that share a label are one row.
        baselines: content of `baselines.json`; with None the file beside the runs is read, if it is there.

    Raises:
        ValueError: no runs, or runs of different metrics.
    """
    metric = common_metric(runs)
    groups = group_runs(runs)
    known = read_baselines(baselines, runs)
    columns, makers = _columns(groups, metric, known)
    rows = [
        Row(
            label=group.label,
            kind="method",
            cells=tuple(make(group) for make in makers),
            tags=_group_tags(group),
            seeds=len(group.finished),
        )
        for group in groups
    ]
    rows = _mark_best(columns, rows)
    for name, bits in describe(known):
        blank = [Cell(_NOTHING)] * len(columns)
        blank[0] = Cell(metric.text(bits), bits)
        rows.append(Row(label=name, kind="baseline", cells=tuple(blank)))
    return Table(tuple(columns), tuple(rows), tuple(_headline(groups, metric, known)), tuple(_notes(groups)))


def describe(baselines: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The n-gram baselines with their bits per byte, in the order of the mapping.

    >>> describe({"bigram": {"bits_per_byte": 3.9}, "corpus": {"name": "wikipedia"}})
    [('bigram', 3.9)]
    """
    found = []
    for name, entry in baselines.items():
        bits = entry.get("bits_per_byte") if isinstance(entry, Mapping) else None
        if isinstance(bits, (int, float)) and not isinstance(bits, bool):
            found.append((str(name), float(bits)))
    return found


def run_tag(run: Run) -> str:
    """What is special about a run: interrupted, diverged, or an empty string."""
    parts = []
    if not run.finished:
        of = "" if run.planned_steps is None else f" of {run.planned_steps}"
        parts.append(f"interrupted at step {run.last_step}{of}")
    if run.diverged_at is not None:
        parts.append(f"diverged: loss not finite at step {run.diverged_at}")
    return "; ".join(parts)


_Maker = Callable[[Group], Cell]


def _columns(
    groups: Sequence[Group], metric: Metric, baselines: Mapping[str, Any]
) -> tuple[list[Column], list[_Maker]]:
    attacks = _attacks(groups)
    if not attacks and metric.key == "bits_per_byte":
        attacks = {"word-swap": {}}

    def number(*keys: str, digits: int) -> _Maker:
        def make(group: Group) -> Cell:
            values = group.values(*keys)
            if not values:
                return Cell(_NOTHING)
            spread = Spread.of(values)
            return Cell(spread.text(digits), spread.mean)

        return make

    def dead(group: Group) -> Cell:
        values, experts = group.values("serving", "dead"), group.values("serving", "experts")
        if not values:
            return Cell(_NOTHING)
        mean = sum(values) / len(values)
        of = f"/{experts[0]:.0f}" if experts else ""
        return Cell(f"{mean:.0f}{of}" if mean == round(mean) else f"{mean:.1f}{of}", mean)

    def sinkhorn(group: Group) -> Cell:
        values, chances = group.values("sinkhorn_steps"), group.values("probability")
        if not values:
            return Cell(_NOTHING)
        mean = sum(values) / len(values)
        return Cell(f"{mean:.0f}" + (f" (p={chances[0]:g})" if chances else ""), mean)

    times = baselines.get("step_times")
    times = times if isinstance(times, Mapping) else {}

    def ratio(group: Group) -> Cell:
        values = times["ratios"].get(group.label)
        if not values:
            return Cell(_NOTHING)
        value = statistics.median(values)
        if group.label == times["baseline"]:
            return Cell(f"{times['milliseconds']:.0f} ms", value)
        return Cell(f"{value:.2f}×", value)

    plan: list[tuple[Column, _Maker]] = [
        (
            Column(
                "valid",
                f"valid\n{metric.heading}",
                f"{capital(metric.name)} over every validation {metric.item}.",
                True,
            ),
            number("valid", metric.key, digits=metric.digits),
        ),
    ]
    if metric.key == "bits_per_byte":
        plan.append(
            (
                Column("perplexity", "perplexity\nper byte", "2 to the power of the bits per byte.", True),
                number("valid", "perplexity", digits=2),
            )
        )
    for attack, options in attacks.items():
        kind = attack.partition("@")[0]  # "fgsm@2" is an "fgsm" under another name
        what = f"{capital(metric.name)} on {'images' if metric.item == 'image' else 'text'} under the {kind} attack"
        plan.append(
            (
                Column(attack, f"{attack}\n{metric.heading}", f"{what}{_how(options)}.", True),
                number("attacked", attack, metric.key, digits=metric.digits),
            )
        )
    plan += [
        (
            Column("max_vio_train", "MaxVio\ntraining", "Mean over steps and layers, last quarter of training.", True),
            number("train", "max_vio", digits=2),
        ),
        (
            Column("max_vio_serving", "MaxVio\nserving", "Over the whole validation set, mean over layers.", True),
            number("serving", "max_vio", digits=2),
        ),
        (Column("dead", "dead\nexperts", "Experts with under 1 % of a fair share in serving.", True), dead),
        (
            Column("sinkhorn_steps", "Sinkhorn\nsteps", "Training steps that ran Sinkhorn; p is the chance per step."),
            sinkhorn,
        ),
    ]
    if times:  # only what was measured in turn can be compared
        what = f"A training step, timed in turn with the other methods', relative to {times['baseline']}; median."
        plan.append((Column("ratio", "time of\na step", what, True), ratio))
    else:
        what = "Wall time of a training step. Runs were made one after another: differences may be the machine's."
        plan.append((Column("ms_per_step", "ms/step\n(wall)", what), number("train", "ms_per_step", digits=1)))
    plan += [
        (
            Column("peak_memory", "peak\nMB", "Peak memory while training.", True),
            number("train", "peak_memory_mb", digits=0),
        ),
    ]
    return [column for column, _ in plan], [make for _, make in plan]


def _attacks(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """The attacks of all finished runs, in the order in which they first appear, with their options.

    Options are what an attack's entry has beside the numbers of a clean evaluation.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        for run in group.finished:
            result = run.result or {}
            for name, entry in (result.get("attacked") or {}).items():
                options = {key: value for key, value in entry.items() if key not in result["valid"]}
                found[str(name)] = found.get(str(name)) or options
    return found


def _how(options: Mapping[str, Any]) -> str:
    """The options of an attack in brackets.

    >>> _how({"rate": 0.025}), _how({"epsilon": 2, "steps": 10}), _how({})
    (' (2.5% of the words)', ' (epsilon=2, steps=10)', '')
    """
    if set(options) == {"rate"} and isinstance(options["rate"], (int, float)):
        return f" ({options['rate']:.1%} of the words)"
    return f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""


def _mark_best(columns: Sequence[Column], rows: Sequence[Row]) -> list[Row]:
    """Mark the lowest value of each column; values that print alike are best together, and if all do, none is."""
    best: set[tuple[int, int]] = set()
    for c, column in enumerate(columns):
        if not column.lower_is_better:
            continue
        finite = {r: row.cells[c].value for r, row in enumerate(rows)}
        values = {r: value for r, value in finite.items() if value is not None and math.isfinite(value)}
        if len(values) < 2:
            continue
        middles = {r: rows[r].cells[c].main for r in values}
        winner = middles[min(values, key=lambda r: values[r])]
        winners = [r for r in values if middles[r] == winner]
        if len(winners) < len(values):
            best |= {(r, c) for r in winners}
    return [
        replace(row, cells=tuple(replace(cell, best=(r, c) in best) for c, cell in enumerate(row.cells)))
        for r, row in enumerate(rows)
    ]


def _group_tags(group: Group) -> tuple[str, ...]:
    several = len(group.runs) > 1
    return tuple(
        f"seed {run.seed} {tag}" if several else tag for run, tag in ((run, run_tag(run)) for run in group.runs) if tag
    )


def _headline(groups: Sequence[Group], metric: Metric, baselines: Mapping[str, Any]) -> list[str]:
    spreads = {group.label: Spread.of(values) for group in groups if (values := group.qualities)}
    finite = {label: spread for label, spread in spreads.items() if math.isfinite(spread.mean)}
    if not spreads:
        return ["No run has finished yet, so there is nothing to compare."]
    if not finite:
        return ["Every finished run diverged: no validation value is finite."]

    lowest = min(finite.values(), key=lambda spread: spread.mean).mean
    winners = [group for group in groups if group.label in finite and _same(finite[group.label].mean, lowest, metric)]
    names = _join([group.label for group in winners])
    number = metric.text(lowest) + metric.sign
    out = []
    if len(finite) == 1:
        out.append(f"Only {names} has finished, with {f'{number} validation {metric.name}'}.")
    elif len(winners) == 1:
        out.append(f"{names} has the lowest validation {metric.name} at this size: {number}.")
    else:
        out.append(f"{names} share the lowest validation {metric.name} at this size: {number}.")
    variants = [group for group in groups if group.method.startswith("ssr") and group.label in finite]
    if variants and len(finite) > len(variants) and not any(group in variants for group in winners):
        out.append("SSR does not win at this size.")
    if len(finite) > 1 and len(winners) == 1:
        out += _certainty(winners[0], [group for group in groups if group.label in finite])

    # Each variant is compared by itself: picking the better of two after the fact would flatter it.
    rivals = [group for group in groups if group.method in _VANILLA and group.label in finite]
    rivals += [group for group in groups if group.method in _BALANCE and group.label in finite]
    compared = []
    for variant in variants:
        own = finite[variant.label].mean
        against = [
            _against(own, finite[rival.label].mean, rival.label, _paired(variant, rival), metric) for rival in rivals
        ]
        if against:
            compared.append(f"{variant.label} is {_join(against)}")
    if compared:
        out.append("; ".join(compared) + ".")

    balanced = {group.label: values for group in groups if (values := group.values("serving", "max_vio"))}
    means = {label: sum(v) / len(v) for label, v in balanced.items() if all(map(math.isfinite, v))}
    if len(means) > 1:
        label = min(means, key=lambda name: means[name])
        out.append(f"{label} serves with the most even load (MaxVio {means[label]:.2f}).")

    for name, bits in describe(baselines)[-1:]:  # the strongest n-gram comes last
        below = sum(spread.mean < bits for spread in finite.values())
        if below == 0:
            out.append(f"No method is below the {name} model ({bits:.3f}) yet.")
        elif below < len(finite):
            out.append(f"{below} of {len(finite)} methods are below the {name} model ({bits:.3f}).")
        else:
            out.append(f"Every finished method is below the {name} model ({bits:.3f}).")
    return out


def _certainty(winner: Group, groups: Sequence[Group]) -> list[str]:
    """From which methods the winner can be told, by the differences of runs that share a seed.

    Runs of a seed share data order and initial weights, so their difference varies less than either; overlap of two
    separate intervals would say too little.
    """
    told: list[str] = []
    level: list[str] = []
    for group in groups:
        difference = _paired(group, winner)
        if group is winner or difference is None or difference.half is None:
            continue
        (told if difference.n >= 3 and difference.mean > difference.half else level).append(group.label)
    if not told and not level:
        return []  # one seed: the notes say what that means
    out = []
    if told:
        out.append(
            f"Paired by seed {winner.label} is below {_join(told)} by more than the 95 % interval of the difference"
        )
    if level:
        out.append(f"{'from' if told else f'Paired by seed {winner.label} cannot be told from'} {_join(level)}")
        if told:
            out[-1] += " it cannot be told"
    count = len(told) + len(level)
    return ["; ".join(out) + f" ({count} comparison{'s' if count > 1 else ''}, not corrected for their number)."]


def _paired(one: Group, other: Group) -> Spread | None:
    """The difference of two methods in validation, over the seeds that both have; None without any."""
    by_seed = [
        {run.seed: value for run in group.finished if (value := run.quality) is not None} for group in (one, other)
    ]
    common = [seed for seed in by_seed[0] if seed in by_seed[1]]
    return Spread.of([by_seed[0][seed] - by_seed[1][seed] for seed in common]) if common else None


def _notes(groups: Sequence[Group]) -> list[str]:
    counts = {len(group.finished) for group in groups if group.finished}
    out = []
    if not counts:
        return ["Unfinished runs have curves but no row of numbers."]
    if 1 in counts:
        who = "1 seed" if counts == {1} else "1 seed for some methods"
        out.append(f"{who}: differences of this size may be chance.")
    if 2 in counts:
        out.append("± is half the range of n = 2 seeds; two seeds say little about chance.")
    many = sorted(count for count in counts if count >= 3)
    if many:
        n = f"{many[0]}" if len(many) == 1 else f"{many[0]} to {many[-1]}"
        out.append(f"± is half the 95 % t-interval of the mean over n = {n} seeds.")
    if any(not run.finished for group in groups for run in group.runs):
        out.append("Interrupted runs have no numbers here; the table averages finished runs only.")
    for group in groups:
        other = [key for key in differences(group.runs) if key not in ("seed", "name")]
        if other:
            out.append(f"The runs of {group.label} differ in more than their seed: {', '.join(other)}.")
    return out


def _against(own: float, other: float, name: str, paired: Spread | None, metric: Metric) -> str:
    if _same(own, other, metric):
        return f"level with {name}"
    # From the printed values, so that a reader who subtracts two cells gets the same number.
    by = metric.text(abs(round(own, metric.digits) - round(other, metric.digits))) + metric.sign
    half = metric.text(paired.half) if paired is not None and paired.n >= 3 and paired.half else ""
    interval = f" (± {half} paired)" if half else ""
    return f"{by}{interval} {'below' if own < other else 'above'} {name}"


def _same(a: float, b: float, metric: Metric) -> bool:
    """Whether two values print alike: a difference that no cell shows is not called one."""
    return metric.text(a) == metric.text(b)


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
