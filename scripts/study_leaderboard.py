"""Places of methods by loss and by balance, with ties as ties: the tables of docs/leaderboard.md.

Of a comparison all pairs of its methods are held against each other, seed by seed, and their p-values corrected by Holm
together. A method's place is one more than the number of methods that are told to be better: methods that no other is
told to be better than are all first, whatever their means. Only comparisons of at least `SEEDS` seeds take part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from sinkroute.lab.study.statistics import LEVEL, Estimate, holm, paired

SEEDS = 8
"""With fewer, differences of the size that is found here are told in less than four of five tries."""
BOARDS = ("dual", "paper-lm", "rates", "words", "collapse", "capacity", "shift")
"""In the page's order; those that are not collected yet are left out."""
BALANCE = "serving.max_vio"

Values = Mapping[str, Mapping[str, float]]  # method -> seed -> value
Read = Callable[[str], dict[str, Any]]


def places(values: Values, lower_is_better: bool = True) -> dict[str, int]:
    """Method -> 1 + the number of methods that are told to be better.

    >>> places({"a": {"0": 1.0, "1": 1.1, "2": 1.0}, "b": {"0": 5.0, "1": 5.1, "2": 5.01}})
    {'a': 1, 'b': 2}
    """
    out = dict.fromkeys(values, 1)
    pairs = list(itertools.combinations(values, 2))
    tests = [paired([values[one][seed] - values[two][seed] for seed in values[one]]) for one, two in pairs]
    chances = holm([1.0 if test.p is None else test.p for test in tests])
    for (one, two), test, p in zip(pairs, tests, chances, strict=True):
        if p < LEVEL:
            out[two if (test.difference.mean < 0) == lower_is_better else one] += 1
    return out


def boards(read: Read, known: set[str]) -> list[tuple[str, str]]:
    """(comparison, size) of all that are collected and have seeds enough."""
    out = []
    for name in BOARDS:
        if name in known:
            found = read(name)
            for size in dict.fromkeys(row["size"] for row in found["statistics"]):
                if min(map(len, _values(found, size, _loss(found)["key"]).values())) >= SEEDS:
                    out.append((name, size))
    return out


def summary(read: Read, known: set[str], balance: bool = False) -> str:
    """A row for a method and a column for a comparison; methods by the mean share of rivals that are better."""
    columns: dict[str, dict[str, int]] = {}
    for name, size in boards(read, known):
        found = read(name)
        metric = {"key": BALANCE, "lower_is_better": True} if balance else _loss(found)
        title = f"`study/{name}`" + f", {size}" * bool(size)
        columns[title] = places(_values(found, size, metric["key"]), metric["lower_is_better"])
    shares: dict[str, list[float]] = {}
    for own in columns.values():
        for method, place in own.items():
            shares.setdefault(method, []).append((place - 1) / (len(own) - 1))
    order = sorted(shares, key=lambda method: (sum(shares[method]) / len(shares[method]), -len(shares[method]), method))
    lines = ["| method | " + " | ".join(columns) + " |", "|" + "---|" * (1 + len(columns))]
    for method in order:
        cells = [_place(own, method) if method in own else "–" for own in columns.values()]
        lines.append("| " + " | ".join([f"`{method}`", *cells]) + " |")
    return "\n".join(lines) + "\n"


def board(name: str, found: Mapping[str, Any]) -> str:
    """One comparison: by loss, then by balance, then by the mean of the loss."""
    loss = _loss(found)
    sizes = list(dict.fromkeys(row["size"] for row in found["statistics"]))
    heads = ["size"] * (len(sizes) > 1) + ["method", "place by loss", loss["title"], "place by balance"]
    heads += ["serving MaxVio", "command"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for size in sizes:
        losses, loads = _values(found, size, loss["key"]), _values(found, size, BALANCE)
        by_loss, by_balance = places(losses, loss["lower_is_better"]), places(loads)
        mean = {method: Estimate.of(list(own.values())) for method, own in losses.items()}
        for method in sorted(losses, key=lambda method: (by_loss[method], by_balance[method], mean[method].mean)):
            only = f"'{method}'" if " " in method else method
            told = [f"`{method}`", _place(by_loss, method), mean[method].text(loss["digits"])]
            told += [_place(by_balance, method), Estimate.of(list(loads[method].values())).text(2)]
            told.append(f"`sinkroute compare study/{name} --only {only}`")
            lines.append("| " + " | ".join([size] * (len(sizes) > 1) + told) + " |")
    return "\n".join(lines) + "\n"


def _place(own: Mapping[str, int], method: str) -> str:
    """
    >>> _place({"a": 1, "b": 1, "c": 3}, "a"), _place({"a": 1, "b": 1, "c": 3}, "c")
    ('1 (2 tied)', '3')
    """
    alike = sum(place == own[method] for place in own.values())
    return f"{own[method]}" + f" ({alike} tied)" * (alike > 1)


def _loss(found: Mapping[str, Any]) -> Mapping[str, Any]:
    metric: Mapping[str, Any] = next(each for each in found["metrics"] if each["key"].startswith("valid."))
    return metric


def _values(found: Mapping[str, Any], size: str, key: str) -> Values:
    rows = [row for row in found["statistics"] if (row["size"], row["metric"]) == (size, key)]
    return {row["method"]: row["seeds"] for row in rows}
