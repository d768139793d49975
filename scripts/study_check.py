"""Every number of the study's tables and results, computed anew: `make study-check`.

Each table of the study's pages from the results, number by number; and each estimate, difference, p
and corrected p of the results from the values of their seeds, by scipy and Holm's rule written here, without the
lab's code. Not looked at: numbers in the pages' sentences, the tables of ways to serve, and slopes over sizes. The exit
code is 1 if a number differs.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import study
from scipy import stats

NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def check() -> bool:
    """Print what was computed anew, and what of it differs; True if nothing does."""
    rows = []
    for path in study.PAGES:
        for mark in study.MARK.finditer(path.read_text(encoding="utf-8")):
            was, now = NUMBER.findall(mark[0]), NUMBER.findall(f"{mark[1]}{study.table(mark['name'])}{mark[3]}")
            wrong = [f"{one} is {two}" for one, two in itertools.zip_longest(was, now) if one != two]
            rows.append((path.name, mark["name"], len(now), wrong))
    for path in sorted(study.RESULTS.glob("*.json")):
        count, wrong = recomputed(study.read(path.stem))
        rows.append((path.name, "from the seeds", count, wrong))
    for where, name, count, wrong in rows:
        told = f"{len(wrong)} differ: {'; '.join(wrong[:3])}" if wrong else "same"
        print(f"{where:28} {name:24} {count:5} numbers  {told}")
    bad = sum(len(wrong) for *_, wrong in rows)
    print(f"{sum(count for _, _, count, _ in rows)} numbers, {bad} differ")
    return not bad


def recomputed(found: Mapping[str, Any]) -> tuple[int, list[str]]:
    """How many statistics were computed anew from the seeds, and which are not what the file says.

    Values have six digits, so that a mean of differences is off by up to some units of their sixth.
    """
    values = {(row["size"], row["method"], row["metric"]): row["seeds"] for row in found["statistics"]}
    told: list[tuple[str, float, float, float]] = []  # where, written, computed, tolerance
    chances: dict[str, list[tuple[str, float, float, float]]] = {}
    for row in found["statistics"]:
        where, metric = " ".join((row["size"], row["method"], row["metric"])).strip(), row["metric"]
        own = np.array(list(row["seeds"].values()), dtype=float)
        unit = 1e-5 * float(np.abs(own).max(initial=0.0))
        if row["estimate"] is not None:
            told += _estimate(where, row["estimate"], own, unit)
        if row["against"] is None:
            continue
        other = values[row["size"], found["reference"], metric]
        pairs = np.array([value - other[seed] for seed, value in row["seeds"].items() if seed in other])
        unit = max(unit, 1e-5 * max(map(abs, other.values())))
        paired = row["against"]["paired"]
        told += _estimate(f"{where} difference", paired["difference"], pairs, unit)
        if paired["p"] is not None:
            near = [float(not pairs.any())] * 3  # runs that cannot differ
            if np.ptp(pairs):
                near = [stats.ttest_1samp(pairs + shift, 0).pvalue for shift in (-unit, 0.0, unit)]
            width = max(near) - min(near) + 2e-3 * near[1] + 1e-12
            told.append((f"{where} p", paired["p"], near[1], width))
            chances.setdefault(metric, []).append((where, paired["p"], row["against"]["p_corrected"], width))
    for several in chances.values():
        if all(corrected is not None for _, _, corrected, _ in several):
            for (where, _, corrected, _), again in zip(several, holm([p for _, p, _, _ in several]), strict=True):
                told.append((f"{where} corrected p", corrected, again, 1e-4 * again))
    wrong = [f"{where}: {was:g} is {now:g}" for where, was, now, within in told if not abs(was - now) <= within]
    return len(told), wrong


def _estimate(
    where: str, written: Mapping[str, Any], own: np.ndarray, unit: float
) -> list[tuple[str, float, float, float]]:
    out = [(f"{where} mean", written["mean"], float(own.mean()), unit)]
    if written["half"] is not None:
        t = stats.t.ppf(0.975, len(own) - 1) / math.sqrt(len(own))
        out.append((f"{where} half", written["half"], float(own.std(ddof=1)) * t, unit * t * math.sqrt(2)))
    return out


def holm(chances: Sequence[float]) -> list[float]:
    """The smallest p times their number, the next times one less, ..., none below the one before."""
    out = dict.fromkeys(range(len(chances)), 0.0)
    worst = 0.0
    for rank, i in enumerate(sorted(out, key=lambda i: chances[i])):
        worst = out[i] = max(worst, min(1.0, (len(chances) - rank) * chances[i]))
    return list(out.values())


if __name__ == "__main__":
    sys.exit(0 if check() else 1)
