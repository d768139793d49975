"""Every test of the study: the registered ones, and each method against its comparison's reference.

A difference is the mean over seeds that both methods have, with its 95 % t-interval. Beside it: p of the paired t-test,
the same corrected by Holm, p of the sign-flip test (which assumes no normal distribution; of n seeds it is at least
2 / 2ⁿ), p of two one-sided tests that the methods differ by `MARGIN` bits or more, and the true difference that one
test finds in four of five tries by the scatter of these pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sinkroute.lab.study.config import find_study, read_study
from sinkroute.lab.study.statistics import LEVEL, Estimate, Paired, holm, paired

MARGIN = 0.0115
"""Bits per symbol: half of 0.023, the paper's gain on WikiText-103 and the least that it reports for Enwik-8."""
HEADS = ("n", "difference", "p", "p (Holm)", "p (sign flip)", f"p (alike within {MARGIN} bits)", "told in 4 of 5 tries")
# Primary comparisons that were registered in words, before a preset had a key for them: method, against, metric, sizes.
IN_WORDS: Mapping[str, list[tuple[str, str, str, tuple[str, ...]]]] = {
    "dual": [("ssr-dual", "quantile ema 0.9", "serving.max_vio", ())],
    "dual-sizes": [("ssr-dual", "quantile ema 0.9", "serving.max_vio", ())],
    "dual-capacity": [
        ("ssr-dual exact", "quantile ema 0.9", "train.dropped", ()),
        ("ssr-dual", "quantile ema 0.9", "train.dropped", ()),
    ],
    "dual-shift": [("ssr-dual", "quantile ema 0.9", "switch.steps_to_balance", ())],
    "rates": [("ssr-dual", "vanilla", "valid.bits_per_byte", ("0.006",))],
}
# What was registered to be tested next, at the sizes where the primary comparison is told; corrected by itself.
AFTERWARDS = {"capacity": [("ssr-dual", "load-balance", "valid.bits_per_byte", ())]}

Read = Callable[[str], dict[str, Any]]


class Test(NamedTuple):
    """One test of one comparison."""

    size: str
    method: str
    against: str
    metric: Mapping[str, Any]
    found: Paired


def registered(read: Read, known: set[str]) -> str:
    """The primary comparisons of all studies that are collected, corrected within each study, and what follows them."""
    lines = ["| comparison | primary | in | " + " | ".join(HEADS) + " |", "|" + "---|" * (len(HEADS) + 3)]
    for name in sorted(known):
        found = read(name)
        sizes = list(dict.fromkeys(row["size"] for row in found["statistics"]))
        for several in (_primary(name, found), AFTERWARDS.get(name, [])):
            tests = [
                _test(found, size, method, against, metric)
                for method, against, metric, only in several
                for size in only or sizes
            ]
            corrected = _corrected(tests)
            for test, p in zip(tests, corrected, strict=True):
                title = f"`study/{name}`" + f", {test.size}" * bool(test.size)
                cells = [title, f"`{test.method}` against {test.against}", test.metric["title"], *_cells(test, p)]
                lines.append("| " + " | ".join(cells) + " |")
            sizes = [test.size for test, p in zip(tests, corrected, strict=True) if p < LEVEL]
    return "\n".join(lines) + "\n"


def tests(found: Mapping[str, Any]) -> str:
    """Each method against the reference, in the first metric; corrected for all rows, as it was collected."""
    metric = found["metrics"][0]["key"]
    rows = [row for row in found["statistics"] if row["metric"] == metric and row["against"] is not None]
    sized = len({row["size"] for row in rows}) > 1
    all_tests = [_test(found, row["size"], row["method"], found["reference"], metric) for row in rows]
    lines = ["| " + "size | " * sized + "method | " + " | ".join(HEADS) + " |"]
    lines.append("|" + "---|" * (len(HEADS) + 1 + sized))
    # As the comparison's other tables have it: what is collected has six digits of a value, and p would be another.
    corrected = [row["against"]["p_corrected"] for row in rows]
    for test, p in zip(all_tests, corrected, strict=True):
        cells = [test.size] * sized + [f"`{test.method}`", *_cells(test, p)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def together(read: Read, names: Sequence[str]) -> str:
    """The primary comparison of studies that differ in their seeds only: each by itself, then all seeds."""
    heads = ("seeds of", *HEADS[:2], "perplexity, %", *HEADS[2:3], *HEADS[4:])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    method, against, key, _ = _primary(names[0], read(names[0]))[0]
    tests = {f"`study/{name}`": _test(read(name), "", method, against, key) for name in names}
    pairs = [pair for name in names for pair in _pairs(read(name), "", method, against, key)]
    tests["together"] = next(iter(tests.values()))._replace(found=paired(pairs, MARGIN))
    for title, test in tests.items():
        cells, bits = _cells(test, None), test.found.difference
        percent = Estimate(100 * (2**bits.mean - 1), 100 * math.log(2) * (bits.half or math.nan), bits.n)
        shown = [title, *cells[:2], percent.text(2, sign=True), cells[2], *cells[4:]]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _primary(name: str, found: Mapping[str, Any]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    if name in IN_WORDS:
        return IN_WORDS[name]
    primary = read_study(find_study(f"study/{name}")).primary
    if not primary.method:
        return []
    against, metric = primary.against or found["reference"], primary.metric or found["metrics"][0]["key"]
    return [(primary.method, against, metric, ())]


def _test(found: Mapping[str, Any], size: str, method: str, against: str, key: str) -> Test:
    metric = next(each for each in found["metrics"] if each["key"] == key)
    pairs = _pairs(found, size, method, against, key)
    return Test(size, method, against, metric, paired(pairs, MARGIN if "bits" in key else None))


def _pairs(found: Mapping[str, Any], size: str, method: str, against: str, key: str) -> list[float]:
    """Differences over the seeds that both have."""
    values = {row["method"]: row["seeds"] for row in found["statistics"] if (row["size"], row["metric"]) == (size, key)}
    return [value - values[against][seed] for seed, value in values[method].items() if seed in values[against]]


def _corrected(several: list[Test]) -> list[float]:
    return holm([1.0 if test.found.p is None else test.found.p for test in several])


def _cells(test: Test, p_corrected: float | None) -> list[str]:
    found, digits = test.found, test.metric["digits"] + 1  # one more than in tables of means: differences are small
    difference = found.difference.text(digits, sign=True)
    told = p_corrected is not None and p_corrected < LEVEL
    cells = [str(found.difference.n), f"**{difference}**" if told else difference]
    cells += [chance(p) for p in (found.p, p_corrected, found.p_flip, found.p_equivalent)]
    return [*cells, "–" if found.detectable is None else f"{found.detectable:.{digits}f}"]


def chance(p: float | None) -> str:
    """A p-value in a table, as far as anyone reads it."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
