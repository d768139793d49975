"""How many seeds a comparison needs, and what the seeds that it has can tell, from the scatter of earlier results.

Differences d of runs that share a seed have a standard deviation s, which earlier results estimate. Effects and margins
below are in units of s.

- The two-sided paired t-test of n differences at level a tells a true difference e with the probability
  P(|T| > t(1 - a/2, n - 1)), T noncentral t with n - 1 degrees of freedom and noncentrality e * sqrt(n).
- Of a family of m tests, Holm's step-down procedure asks a/m of the smallest p, and a of the last one where all others
  are told. A seed count at a/m therefore holds whatever the others show; at a, only where all others are told.
- Two one-sided tests (TOST) at level a call two methods alike within a margin g when mean - t(1 - a, n - 1) s_n > -g
  and mean + t(1 - a, n - 1) s_n < g, s_n = s / sqrt(n) as estimated. Their power is the integral over the estimate of
  s, which is s * sqrt(chi2 / (n - 1)) (Owen, Biometrika 52, 1965). It is not the difference of two noncentral t
  probabilities, which falls below 0 for few seeds.

The scatter is itself estimated. Its 95 % interval is that of chi2; a plan that has to hold takes the upper end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.text import Text

from sinkroute.lab.screen import Column, ScreenTable
from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.statistics import LEVEL, detectable, power, smallest_effect

__all__ = ["Scatter", "Source", "detectable", "power", "power_tables", "read_sources", "seeds_needed", "tost_power"]

POWERS = (0.8, 0.9)
Power = Callable[[float, int, float], float]  # of an effect or a margin, a number of seeds, a level
_MOST = 10_000  # seeds; nobody runs more


def tost_power(margin: float, n: int, level: float = LEVEL, true: float = 0.0) -> float:
    """How often two one-sided tests of n differences call them alike within `margin`, where they differ by `true`.

    >>> round(tost_power(1.0, 10), 3)  # about as often as ten seeds find a difference of that size
    0.795
    """
    return alike(margin * math.sqrt(n), n - 1, level, true * math.sqrt(n))


def alike(margin: float, freedom: int, level: float = LEVEL, true: float = 0.0) -> float:
    """The power of two one-sided tests in units of the estimate's true standard error, with its degrees of freedom."""
    from scipy import integrate, stats

    t = stats.t.ppf(1 - level, freedom)
    most = margin / t  # a standard error above it calls nothing alike

    def at(error: float) -> float:
        inside = stats.norm.cdf(margin - t * error - true) - stats.norm.cdf(-margin + t * error - true)
        return float(inside * stats.chi.pdf(error * math.sqrt(freedom), freedom) * math.sqrt(freedom))

    found, _ = integrate.quad(at, 0, most, points=[min(1.0, most / 2)], limit=200)
    return float(found)


def seeds_needed(power_of: Callable[[int], float], wanted: float) -> int | None:
    """The smallest number of seeds whose power is `wanted`; None above 10,000.

    >>> seeds_needed(lambda n: power(0.5, n), 0.8)
    34
    """
    low, high = 1, 2
    while power_of(high) < wanted:
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= wanted else (middle, high)
    return high


@dataclass(frozen=True)
class Scatter:
    """The standard deviation of paired differences, pooled: the root of the mean variance, weighted by its freedom.

    Attributes:
        value: of one difference.
        freedom: of the estimate.
    """

    value: float
    freedom: int

    @classmethod
    def of(cls, pairs: Iterable[Sequence[float]]) -> Scatter | None:
        """Of the differences of several pairs, each about its mean; None where no pair has two seeds.

        >>> Scatter.of([[1.0, 3.0], [5.0, 5.0, 5.0]])  # 2 of one degree of freedom, 0 of two
        Scatter(value=0.816..., freedom=3)
        """
        squares, freedom = 0.0, 0
        for differences in pairs:
            mean = math.fsum(differences) / max(len(differences), 1)
            squares += math.fsum((each - mean) ** 2 for each in differences)
            freedom += max(len(differences) - 1, 0)
        return cls(math.sqrt(squares / freedom), freedom) if freedom else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, for normal differences.

        >>> low, high = Scatter(1.0, 9).interval
        >>> round(low, 3), round(high, 3)  # sqrt(9 / 19.023), sqrt(9 / 2.700)
        (0.688, 1.826)
        """
        from scipy import stats

        low, high = stats.chi2.ppf([0.975, 0.025], self.freedom)
        return self.value * math.sqrt(self.freedom / low), self.value * math.sqrt(self.freedom / high)


@dataclass(frozen=True)
class Source:
    """Earlier results.

    Attributes:
        name: of the file or folder.
        values: (size, method, metric) → seed → number.
        seconds_per_step: of training, the mean over its runs; None where steps or seconds are not told.
        active: the mean of its runs' active parameters; None without.
    """

    name: str
    values: Mapping[tuple[str, str, str], Mapping[str, float]]
    seconds_per_step: float | None
    active: float | None

    def pairs(self, method: str | None, against: str | None, metric: str) -> Iterator[tuple[str, list[float]]]:
        """Label and differences of each pair of one size that has two seeds; None stands for any method."""
        keys = [key for key in self.values if key[2] == metric]
        for size, other, _ in keys:
            if against not in (None, other):
                continue
            for key in keys:
                if key[0] == size and key[1] != other and method in (None, key[1]):
                    one, two = self.values[key], self.values[size, other, metric]
                    differences = [one[seed] - two[seed] for seed in one if seed in two]
                    if len(differences) > 1 and (method is not None or against is not None or key[1] < other):
                        yield f"{size} {key[1]} - {other}".strip(), differences


def read_sources(places: Sequence[str | Path]) -> list[Source]:
    """Collected results (a JSON file of `benchmarks/results/study`, a folder of them) or a folder that was compared.

    Raises:
        ValueError: nothing there has the statistics of a comparison.
    """
    out = []
    for place in map(Path, places):
        own = place / "results.json"
        files = [own] if own.is_file() else sorted(place.glob("*.json")) if place.is_dir() else [place]
        found = [_read(path, place.name if path is own else path.stem) for path in files if path.is_file()]
        if not any(found):
            raise ValueError(
                f"--earlier {place} has no results of a comparison; give a results.json, a folder of such files, or "
                "the folder of a comparison after `sinkroute compare NAME --report`"
            )
        out += [each for each in found if each]
    return out


def _read(path: Path, name: str) -> Source | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = {(row["size"], row["method"], row["metric"]): dict(row["seeds"]) for row in found["statistics"]}
    except (ValueError, KeyError, TypeError):
        return None
    for (size, method, metric), seeds in list(rows.items()):
        where, _, last = metric.rpartition(".")
        if last == "perplexity":  # of words, whose bits some older results do not have: its logarithm
            bits = (size, method, f"{where}.bits_per_symbol")
            rows.setdefault(bits, {seed: math.log2(value) for seed, value in seeds.items()})
    return Source(name, rows, *_cost(found))


def _cost(found: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Seconds of a training step and active parameters, each the mean over the runs."""
    done = [cell for cell in found["cells"] if cell.get("state") == "done"]
    runs = [cell.get("result") or cell for cell in done]
    active = [run["parameters"]["active"] for run in runs if "parameters" in run]
    seconds = math.fsum(run["train"]["seconds"] for run in runs) if all("train" in run for run in runs) else None
    seconds = found.get("seconds") if seconds is None else seconds
    steps = sum(_steps(found["compare"], cell["size"]) for cell in done)
    return seconds / steps if seconds and steps else None, math.fsum(active) / len(active) if active else None


def _steps(compare: Mapping[str, Any], size: str) -> int:
    from sinkroute.lab.config import Config, from_mapping
    from sinkroute.lab.study.config import merged, read_base

    section = dict(compare["sizes"].get(size, {}))
    base = read_base(section.pop("base", compare["base"]), Path())
    return from_mapping(Config, merged(merged(base, compare["config"]), section)).train.steps


def power_tables(plan: Plan, sources: Sequence[Source]) -> tuple[list[ScreenTable], list[str]]:
    """What `sinkroute compare --power` prints: the seeds that are needed, what the planned ones tell, and the cost.

    Raises:
        ValueError: no earlier result has the metric in a pair with two seeds.
    """
    compare, primary = plan.study, plan.study.primary
    against = primary.against or plan.reference
    metric = primary.metric or next(iter(compare.metrics), "") or _headline(sources)
    methods = [primary.method] if primary.method else [name for name in plan.methods if name != against]
    family, n = len(methods) * len(plan.sizes), len({cell.seed for cell in plan.cells})
    if n < 2:
        raise ValueError(f"{plan.path.name} has {n} seed; a paired test needs two or more")
    which, rows = _scatters(sources, methods, against, metric)
    table = _table(f"Scatter of a pair's difference in {metric}", "from", "pair", "seeds", "sd", "95 %")
    for source, label, differences in rows if len(rows) <= 12 else ():
        one = Scatter.of([differences])
        assert one is not None
        table.add(source, label, str(len(differences)), f"{one.value:.3g}", "{:.3g} - {:.3g}".format(*one.interval))
    pooled = Scatter.of(differences for _, _, differences in rows)
    assert pooled is not None
    low, high = pooled.interval
    table.add(
        "pooled",
        f"{len(rows)} pair{'s' * (len(rows) > 1)}",
        "",
        Text(f"{pooled.value:.3g}", style="bold"),
        f"{low:.3g} - {high:.3g}",
    )
    levels = {"alone": LEVEL} | ({f"first of {family}": LEVEL / family} if family > 1 else {})
    tests: list[tuple[str, float, Power, float | None]]
    tests = [(f"two-sided, {where}", level, power, primary.effect) for where, level in levels.items()]
    tests.append(("alike (TOST)", LEVEL, tost_power, primary.equivalence))
    tables = [table, _table(f"What {n} seeds tell", "test", "level", "sd", *(f"{wanted:.0%}" for wanted in POWERS))]
    if primary.effect or primary.equivalence:
        heads = (*(f"seeds for {wanted:.0%}" for wanted in POWERS), f"power of {n}")
        tables.append(_table("Seeds that are needed", "test", "level", "sd", *heads))
    for sd in (pooled.value, high):
        for what, level, of, asked in tests:
            told = [f"{smallest_effect(_of_size(of, n, level), wanted) * sd:.3g}" for wanted in POWERS]
            tables[1].add(what, f"{level:.3g}", f"{sd:.3g}", *told)
            if asked is not None:
                seeds = [seeds_needed(_of_seeds(of, asked / sd, level), wanted) for wanted in POWERS]
                shown = [f"over {_MOST:,}" if each is None else str(each) for each in seeds]
                shown.append(f"{of(asked / sd, n, level):.0%}")
                tables[2].add(f"{what}, {asked:g}", f"{level:.3g}", f"{sd:.3g}", *shown)
    shared = " Pairs share runs, so its interval is too narrow." if len(methods) > 1 or ", for no" in which else ""
    notes = [f"Scatter: {which}. sd is the pooled one, then the upper end of its 95 % interval.{shared}"]
    if primary.effect is None:
        notes.append("The study names no effect (primary.effect), so what its seeds tell is all that can be said.")
    return tables, [*notes, _hours(plan, sources)]


def _of_size(of: Power, n: int, level: float) -> Callable[[float], float]:
    return lambda size: of(size, n, level)


def _of_seeds(of: Power, size: float, level: float) -> Callable[[int], float]:
    return lambda n: of(size, n, level)


def _table(title: str, *heads: str) -> ScreenTable:
    return ScreenTable([Column(head, words=head in ("from", "pair", "test")) for head in heads], title=title)


def _headline(sources: Sequence[Source]) -> str:
    return next((metric for source in sources for _, _, metric in source.values), "valid.bits_per_byte")


def _scatters(
    sources: Sequence[Source], methods: Sequence[str], against: str, metric: str
) -> tuple[str, list[tuple[str, str, list[float]]]]:
    """The pairs from which the scatter is taken: those of the comparison itself, else the nearest that there are."""
    choices: list[tuple[str, list[tuple[str | None, str | None]]]] = [
        (f"the same methods against {against}", [(method, against) for method in methods]),
        (f"other methods against {against}, for no earlier result has these", [(None, against)]),
        ("any two methods, for no earlier result has these", [(None, None)]),
    ]
    for which, pairs in choices:
        rows = [
            (source.name, label, differences)
            for source in sources
            for method, other in pairs
            for label, differences in source.pairs(method, other, metric)
        ]
        if Scatter.of(differences for _, _, differences in rows):
            return which, rows
    known = sorted({key[2] for source in sources for key in source.values})
    raise ValueError(f"no earlier result has two methods with two seeds of {metric}; there are {', '.join(known)}")


def _hours(plan: Plan, sources: Sequence[Source]) -> str:
    """The training of the whole study in core-hours, from the earlier results whose models are nearest in size."""
    import torch

    from sinkroute.lab.models.registry import make_model

    timed = [(source, source.seconds_per_step, source.active) for source in sources]
    rates = [
        (source.name, math.log(active), seconds / active) for source, seconds, active in timed if seconds and active
    ]
    if not rates:
        return "Core-hours: no earlier result says how long its runs took."
    sizes: dict[str, int] = {}
    total, names = 0.0, set()
    for cell in plan.cells:
        if cell.size not in sizes:
            with torch.device("meta"):
                sizes[cell.size] = make_model(cell.config).count_parameters().active
        active = sizes[cell.size]
        nearest = min(abs(math.log(active) - size) for _, size, _ in rates)
        alike_in_size = [row for row in rates if abs(math.log(active) - row[1]) < nearest + 0.1]
        names |= {name for name, _, _ in alike_in_size}
        total += cell.config.train.steps * active * median(rate for _, _, rate in alike_in_size)
    told = ", ".join(sorted(names)) if len(names) < 4 else f"{len(names)} comparisons of models of about that size"
    return (
        f"Training: about {total / 3600:.1f} core-hours for {len(plan.cells)} runs, in proportion to steps "
        f"and active parameters, by the median of {told}; evaluation comes on top."
    )
