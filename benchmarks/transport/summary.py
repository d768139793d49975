"""From the records of single problems to ratios, geometric means and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .attempt import Record
from .measure import TOLS
from .peers import PEERS

ALL = "all sizes"


def summarise(records: Sequence[Record], method: str) -> dict[str, Any]:
    """All that the tables show, by tolerance and size; ratios are a peer's seconds over ours."""
    content: dict[str, Any] = {}
    for tol in (f"{tol:g}" for tol in TOLS):
        compared = [record for record in records if any(tol in by_tol for by_tol in record["peers"].values())]
        robust = _robust(compared, tol)
        content[tol] = {
            "ours": {size: _ours(part, method, tol) for size, part in _by_size(records)},
            "peers": {
                name: {size: _peer(part, method, tol, name) for size, part in _by_size(compared)} for name in PEERS
            },
            "robust": robust,
            "best robust": {size: _best(part, method, tol, robust) for size, part in _by_size(compared)},
            "best of any kind": {size: _best(part, method, tol, PEERS) for size, part in _by_size(compared)},
        }
    return content


def seconds_of(record: Record) -> float | None:
    """Of a method on a problem, the extrapolated ones included; None where it did not reach the tolerance."""
    if record.get("status") == "extrapolated":
        return float(record["extrapolated_seconds"])
    return statistics.median(record["seconds"]) if record.get("status") == "reached" else None


def geometric_mean(values: Iterable[float]) -> float | None:
    logarithms = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logarithms)) if logarithms else None


def _by_size(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    sizes = list(dict.fromkeys(record["size"] for record in records))
    parts = [(size, [record for record in records if record["size"] == size]) for size in sizes]
    return [*parts, (ALL, list(records))] if len(sizes) > 1 else parts


def _robust(records: Sequence[Record], tol: str) -> list[str]:
    """The log-domain peers that failed on no problem that they were asked, with those that stand in where they did."""
    families = [
        [name, *(other for other, variant in PEERS.items() if variant.instead_of == name)]
        for name, peer in PEERS.items()
        if peer.log_domain and not peer.instead_of
    ]

    def solves(family: list[str], record: Record) -> bool:
        asked = [record["peers"][name][tol]["status"] for name in family if tol in record["peers"].get(name, {})]
        return not asked or any(status != "failed" for status in asked)

    return [name for family in families if all(solves(family, record) for record in records) for name in family]


def _ours(records: Sequence[Record], method: str, tol: str) -> dict[str, Any]:
    ours = [record["ours"][method][tol] for record in records]
    reached = [one for one in ours if one["status"] == "reached"]
    content: dict[str, Any] = {
        "problems": len(ours),
        "failed": [record["name"] for record, one in zip(records, ours, strict=True) if one["status"] != "reached"],
        "largest_true_error": max(filter(None, (one.get("true_error") for one in ours)), default=None),
    }
    if not reached:
        return content
    passes, warm = [one["passes"] for one in reached], [one["warm"]["passes"] for one in reached]
    # Near the rounding of float64 a ratio of errors says nothing about honesty.
    honesty = [one["column_error"] / one["true_error"] for one in reached if one["true_error"] > 1e-12]
    return content | {
        "passes": {"mean": statistics.fmean(passes), "max": max(passes)},
        "warm_passes": {"mean": statistics.fmean(warm), "max": max(warm)},
        "milliseconds": {
            "geometric mean": geometric_mean(1e3 * statistics.median(one["seconds"]) for one in reached),
            "max": max(1e3 * statistics.median(one["seconds"]) for one in reached),
            "without top-k": geometric_mean(1e3 * statistics.median(one["without_topk"]["seconds"]) for one in reached),
            "warm": geometric_mean(1e3 * statistics.median(one["warm"]["seconds"]) for one in reached),
        },
        "spread": statistics.median(max(one["seconds"]) / min(one["seconds"]) for one in reached),
        "honesty": {"min": min(honesty, default=None), "max": max(honesty, default=None)},
    }


def _peer(records: Sequence[Record], method: str, tol: str, name: str) -> dict[str, Any]:
    asked = [(record["peers"][name][tol], record) for record in records if tol in record["peers"].get(name, {})]
    ratios = [ratio for one, record in asked if (ratio := _ratio(one, record, method, tol)) is not None]
    return {
        "ratio": geometric_mean(ratios),
        **{status: sum(one["status"] == status for one, _ in asked) for status in ("reached", "extrapolated")},
        **{status: sum(one["status"] == status for one, _ in asked) for status in ("capped", "failed")},
    }


def _ratio(one: Record, record: Record, method: str, tol: str) -> float | None:
    theirs, ours = seconds_of(one), seconds_of(record["ours"][method][tol])
    return None if theirs is None or ours is None else theirs / ours


def _best(records: Sequence[Record], method: str, tol: str, names: Iterable[str]) -> dict[str, Any]:
    """Against the fastest of these peers on each problem."""
    best: list[tuple[float, str, str, str]] = []
    for record in records:
        candidates = [
            (ratio, name, record["name"], one["status"])
            for name in names
            if (one := record["peers"].get(name, {}).get(tol))
            and (ratio := _ratio(one, record, method, tol)) is not None
        ]
        best += [min(candidates)] if candidates else []
    content: dict[str, Any] = {
        "ratio": geometric_mean(ratio for ratio, *_ in best),
        "measured ratio": geometric_mean(ratio for ratio, *_, status in best if status == "reached"),
        "problems": len(best),
        "faster": sum(ratio > 1 for ratio, *_ in best),
        "extrapolated": sum(status == "extrapolated" for *_, status in best),
        "without a time": len(records) - len(best),
    }
    if best:
        ratio, name, problem, _ = min(best)
        content["worst"] = {"ratio": ratio, "peer": name, "problem": problem}
    return content


def show(summary: dict[str, Any], records: Sequence[Record], method: str, console: Console) -> None:
    """All tables."""
    for tol, content in summary.items():
        _show_ours(content["ours"], method, tol, console)
        if any(content["peers"][name] for name in PEERS):
            _show_peers(content["peers"], tol, console)
            _show_best(content, tol, console)
    errors = [record["sinkhorn"]["error_after_8"] for record in records if "sinkhorn" in record]
    if errors:
        console.print(
            f"sinkhorn-router-pytorch as it ships, 8 iterations: error median {statistics.median(errors):.1%}, "
            f"largest {max(errors):.0%}",
            highlight=False,
        )


def _table(title: str, first: str, columns: Iterable[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _show_ours(ours: dict[str, Any], method: str, tol: str, console: Console) -> None:
    columns = ("reached", "passes", "warm start", "ms", "without top-2", "warm start", "spread", "error", "stated/true")
    caption = (
        "passes: mean, max; ms: geometric mean, max; spread: slowest / fastest timing, median; "
        "error: the largest, in float64; stated/true: smallest to largest"
    )
    table = _table(f"sinkroute {method} to {tol}", "size", columns, caption)
    for size, one in ours.items():
        start = (size, f"{one['problems'] - len(one['failed'])}/{one['problems']}")
        if "passes" not in one:
            table.add_row(*start)
            continue
        milliseconds, honesty = one["milliseconds"], one["honesty"]
        table.add_row(
            *start,
            *(f"{one[key]['mean']:.1f}, {one[key]['max']:.3g}" for key in ("passes", "warm_passes")),
            f"{milliseconds['geometric mean']:.3g}, {milliseconds['max']:.3g}",
            *(f"{milliseconds[key]:.3g}" for key in ("without top-k", "warm")),
            f"{one['spread']:.2f}",
            f"{one['largest_true_error']:.1e}",
            "" if honesty["min"] is None else f"{honesty['min']:.2f}–{honesty['max']:.2f}",
        )
    console.print(table)
    for problem in dict.fromkeys(problem for one in ours.values() for problem in one["failed"]):
        console.print(f"  failed: {problem}", highlight=False)


def _show_peers(peers: dict[str, Any], tol: str, console: Console) -> None:
    sizes = list(dict.fromkeys(size for by_size in peers.values() for size in by_size))
    caption = (
        "geometric mean over the problems where the peer has a time, and on how many it "
        "reached the tolerance / has an extrapolated time / was capped / failed; (exp): not in the log domain"
    )
    table = _table(f"Peers to {tol}: times as long as sinkroute", "peer", sizes, caption)
    for name, by_size in peers.items():
        cells = []
        for one in by_size.values():
            counts = [one[status] for status in ("reached", "extrapolated", "capped", "failed")]
            ratio = "–" if one["ratio"] is None else f"{one['ratio']:.3g}×"
            cells.append(f"{ratio} {'/'.join(map(str, counts))}" if any(counts) else "")
        table.add_row(name + ("" if PEERS[name].log_domain else " (exp)"), *cells)
    console.print(table)


def _show_best(content: dict[str, Any], tol: str, console: Console) -> None:
    columns = ("geo. mean", "without extrapolated", "problems", "extrapolated", "sinkroute faster", "no peer's time")
    caption = f"never failing: in the log domain, without a failure: {'; '.join(content['robust']) or 'none'}"
    table = _table(f"Times as long as sinkroute: the fastest peer of each problem, to {tol}", "size", columns, caption)
    worst = []
    for kind, title in (("best robust", "never failing"), ("best of any kind", "any kind")):
        for size, one in content[kind].items():
            if "worst" not in one:
                continue
            table.add_row(
                f"{title}, {size}",
                *("–" if one[key] is None else f"{one[key]:.2f}×" for key in ("ratio", "measured ratio")),
                *(str(one[key]) for key in ("problems", "extrapolated")),
                f"{one['faster']}/{one['problems']}",
                str(one["without a time"]),
            )
            if size != ALL:
                worst.append("worst against {0}: {ratio:.2f}× on {problem}, {peer}".format(title, **one["worst"]))
        table.add_section()
    console.print(table)
    console.print(*worst, sep="\n", highlight=False)


def show_memory(memory: dict[str, dict[str, dict[str, float]]], console: Console) -> None:
    columns = ("scores", "solve", "solve and top-2")
    table = _table("Peak resident memory on top of the logits, MiB", "problem and method", columns)
    for title, by_method in memory.items():
        for method, extra in by_method.items():
            # The kernel counts a thread's resident pages in batches: less than 1 MiB is not resolved.
            figures = (extra[key] for key in ("scores", "solve", "solve and topk"))
            table.add_row(f"{title}, {method}", *("< 1" if one < 1 else f"{one:.0f}" for one in figures))
    console.print(table)
