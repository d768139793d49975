"""What the study has found, from runs to pages.

    python scripts/study.py collect runs/study/paper-lm ...   # results.json of comparisons -> benchmarks/results/study/
    python scripts/study.py pages                             # the tables of the study's pages
    python scripts/study.py power                             # the differences that each comparison could tell
    python scripts/study.py floor                             # the MaxVio of balanced routing, by chance, at each size
    python scripts/study.py keep runs/study/NAME ...          # what is finished -> benchmarks/results/study/kept/
    python scripts/study.py restore NAME [FOLDER]             # and back: `sinkroute compare` goes on from there

A table stands in a page between `<!-- study: NAME -->` and `<!-- end -->`; `pages` writes it anew from the collected
results, and a test holds pages and results together. What is collected is the comparison's `results.json` without the
configurations of single runs, which the comparison's own file and the hashes stand for.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import study_leaderboard
import study_tests
from scipy import stats
from study_tests import chance

from sinkroute.lab.study.cells import Plan, expand
from sinkroute.lab.study.config import find_study, read_study
from sinkroute.lab.study.keep import keep, restore
from sinkroute.lab.study.power import detectable
from sinkroute.lab.study.statistics import LEVEL, Blocks, Estimate, Paired, blocks, holm, paired

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "study"
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("study", "study-tests", "leaderboard"))

# Runs shared the machine: their time per step means nothing. `overhead` is what measures it.
UNTIMED = "train.ms_per_step"
MARK = re.compile(r"(<!-- study: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Where loads are counted: tokens (of two heads, twice as many), experts, top-k. Serving adds up all that is evaluated.
COUNTED = {
    "a step on bytes or words": (512, 16, 2),
    "the same with two heads": (1024, 16, 2),
    "a step on images": (128 * 17, 8, 2),
    "a step of `study/dual-sizes`: 64 top-8": (512, 64, 8),
    "64 top-2": (512, 64, 2),
    "16 top-1": (512, 16, 1),
    "128 tokens": (128, 16, 2),
    "a step of the demo": (1024, 8, 2),
    "serving, 131,072 bytes": (131072, 16, 2),
    "serving, 24,476 words": (24476, 16, 2),
}

# Against whom the skewed start is registered.
SKEWED = "quantile, ema 0.9"
# Name of a table -> comparison, its rows, against whom each is held, and in what; the headline's metric unless told.
PAIRS = {
    "rivals": (
        "paper-lm",
        ("ssr-l", "ssr-s", "ssr-bias", "ssr-fold"),
        ("load-balance", "sinkhorn", "loss-free", "quantile"),
    ),
    "heads": ("paper-lm", ("2-head ssr-s", "2-head z-loss"), ("2-head vanilla",)),
    "dual-serving": (
        "dual",
        ("ssr-dual", "ssr-dual exact", "ssr-bias every step"),
        ("quantile ema 0.9", "loss-free 0.001", "load-balance", "bip cold"),
        "serving.max_vio",
    ),
    "dual-sizes-serving": (
        "dual-sizes",
        ("ssr-dual", "ssr-dual exact"),
        ("quantile ema 0.9", "loss-free", "load-balance"),
        "serving.max_vio",
    ),
    "collapse-loss": (
        "collapse",
        ("ssr-dual", "ssr-l"),
        ("load-balance", "loss-free", "quantile ema 0.9"),
    ),
    "capacity-loss": (
        "capacity",
        ("ssr-dual", "ssr-dual exact", "ssr-l"),
        ("load-balance", "quantile ema 0.9", "vanilla"),
        "valid.bits_per_byte",
    ),
    "dual-loss": (
        "dual",
        ("ssr-dual", "ssr-dual exact", "ssr-bias every step"),
        ("quantile ema 0.9", "quantile", "loss-free 0.001", "load-balance", "vanilla"),
    ),
}


def collect(folder: Path) -> Path:
    """Keep what a comparison has found, small enough for a repository."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    kept = ("title", "question", "file", "compare", "overrides", "reference", "machine", "correction", "metrics")
    slim: dict[str, Any] = {key: found[key] for key in kept}
    slim["seconds"] = round(sum(_seconds(cell) for cell in found["cells"]))
    slim["cells"] = [
        {key: cell[key] for key in ("size", "method", "seed", "hash", "state")} | _of_run(cell)
        for cell in found["cells"]
    ]
    slim["statistics"], slim["modes"], slim["trends"] = found["statistics"], found["modes"], found["trends"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{Path(found['file']).stem}.json"
    path.write_text(json.dumps(_short(slim), ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _seconds(cell: Mapping[str, Any]) -> float:
    return float((cell["result"] or {}).get("train", {}).get("seconds", 0.0))


def _of_run(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {key: cell["result"][key] for key in ("parameters", "sinkhorn_steps")} if cell["result"] else {}


def _short(value: Any) -> Any:
    """Six digits of each number: more are noise, and make the file twice as long."""
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def table(name: str) -> str:
    """The rows of a comparison as Markdown; those of `ACROSS` are tables over several, or over none."""
    if name in ACROSS:
        return ACROSS[name]()
    if name in PAIRS:
        return _pairs(*PAIRS[name])
    if name.startswith("board-"):
        name = name.removeprefix("board-")
        return study_leaderboard.board(name, read(name))
    if name.startswith("tests-"):
        return study_tests.tests(read(name.removeprefix("tests-")))
    if name.startswith("trend-"):
        return _trend(read(name.removeprefix("trend-")))
    return _comparison(read(name))


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _comparison(found: Mapping[str, Any]) -> str:
    timed = {metric["key"] for metric in found["metrics"]} == {UNTIMED}
    metrics = [metric for metric in found["metrics"] if timed or metric["key"] != UNTIMED]
    headline = metrics[0]
    by_key = {(row["size"], row["method"], row["metric"]): row for row in found["statistics"]}
    rows = list(dict.fromkeys((row["size"], row["method"]) for row in found["statistics"]))
    sized = len({size for size, _ in rows}) > 1
    plans = _plans(found)
    heads = ["size"] * sized + ["method", "n", headline["title"], f"against {found['reference']}", "p (Holm)"]
    heads += [metric["title"] for metric in metrics[1:]] + ["plans"] * any(plans.values())
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for size, method in rows:
        first = by_key[size, method, headline["key"]]
        against = first["against"]
        difference = p = ""
        if against is not None:
            difference = _spread(against["paired"]["difference"], headline["digits"], sign=True)
            p = chance(against["p_corrected"])
            if against["verdict"] in ("better", "worse"):
                difference = f"**{difference}**"
        cells = [size] * sized + [f"`{method}`", str(len(first["seeds"]))]
        cells += [_spread(first["estimate"], headline["digits"]), difference, p]
        cells += [_spread(by_key[size, method, m["key"]]["estimate"], m["digits"]) for m in metrics[1:]]
        cells += [f"{plans[size, method]:.0f}"] * any(plans.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _pairs(name: str, rows: tuple[str, ...], columns: tuple[str, ...], key: str = "") -> str:
    found = read(name)
    metric = next(metric for metric in found["metrics"] if not key or metric["key"] == key)
    own = [row for row in found["statistics"] if row["metric"] == metric["key"]]
    values = {(row["size"], row["method"]): row["seeds"] for row in own}
    sizes = list(dict.fromkeys(row["size"] for row in own))
    heads = ["size"] * (len(sizes) > 1) + [""] + [f"against `{other}`" for other in columns]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    pairs = {}
    for size in sizes:
        for method in rows:
            for other in columns:
                one, two = values[size, method], values[size, other]
                pairs[size, method, other] = paired([one[seed] - two[seed] for seed in one if seed in two])
    corrected = dict(zip(pairs, holm([pair.p for pair in pairs.values()]), strict=True))
    for size in sizes:
        for method in rows:
            cells = [size] * (len(sizes) > 1) + [f"`{method}`"]
            for other in columns:
                shown = _spread(asdict(pairs[size, method, other].difference), 3, sign=True)
                p = corrected[size, method, other]
                cells.append(f"**{shown}**, {chance(p)}" if p < LEVEL else f"{shown}, {chance(p)}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plans(found: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    steps: dict[tuple[str, str], list[int]] = {}
    for cell in found["cells"]:
        steps.setdefault((cell["size"], cell["method"]), []).append(cell.get("sinkhorn_steps", 0))
    return {key: sum(values) / len(values) for key, values in steps.items()}


def _spread(estimate: Mapping[str, Any] | None, digits: int, sign: bool = False) -> str:
    if estimate is None:
        return "–"
    mean = f"{estimate['mean']:{'+' if sign else ''}.{digits}f}"
    return mean if estimate["half"] is None else f"{mean} ± {estimate['half']:.{digits}f}"


def _trend(found: Mapping[str, Any]) -> str:
    lines = ["| method | gain per doubling | p | at 10⁹ active parameters, if the line held |", "|---|---|---|---|"]
    for row in found["trends"]:
        line, far = row["line"], row["at_1e9"]
        reach = f"{far['gain']:+.3f} ± {far['half_of_the_line']:.3f}"
        lines.append(f"| `{row['method']}` | {_spread(line['slope'], 4, sign=True)} | {line['p']:.3f} | {reach} |")
    return "\n".join(lines) + "\n"


def _compute() -> str:
    lines = ["| comparison | runs | seeds | training, core-minutes | command |", "|---|---|---|---|---|"]
    trained: dict[str, float] = {}  # two comparisons may look at the same runs
    for path in sorted(RESULTS.glob("*.json")):
        found = read(path.stem)
        done = [cell for cell in found["cells"] if cell["state"] == "done"]
        seeds = len({cell["seed"] for cell in done})
        trained[found["compare"]["out"]] = found["seconds"]
        command = f"`sinkroute compare study/{path.stem}`"
        lines.append(f"| {found['title']} | {len(done)} | {seeds} | {found['seconds'] / 60:.0f} | {command} |")
    lines.append(f"| **together** | | | **{sum(trained.values()) / 60:.0f}** | |")
    return "\n".join(lines) + "\n"


def _power() -> str:
    lines = [
        "| comparison | unit | seeds | scatter of a pair: median (from – to) | told by one test | told first of all "
        "| residual of method + seed: scatter of a pair | seeds explain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        found = read(path.stem)
        metric = found["metrics"][0]
        if metric["key"] == UNTIMED:
            continue
        rows = [row["against"]["paired"]["difference"] for row in _against(found, metric["key"])]
        n = min(row["n"] for row in rows)
        scatter = [row["half"] * math.sqrt(row["n"]) / stats.t.ppf(0.975, row["n"] - 1) for row in rows]
        digits = metric["digits"]
        middle = median(scatter)
        alone, first = middle * detectable(n), middle * detectable(n, LEVEL / len(rows))
        cells = [found["title"], metric["title"].removeprefix("valid "), str(n)]
        cells += [f"{middle:.{digits}f} ({min(scatter):.{digits}f} – {max(scatter):.{digits}f})"]
        cells += [f"{alone:.{digits}f}", f"{first:.{digits}f} of {len(rows)}"]
        models = _blocks(found, metric["key"])
        pairs = math.sqrt(2 * sum(each.residual**2 for each in models) / len(models))
        cells += [f"{pairs:.{digits}f}", f"{sum(each.of_seeds for each in models) / len(models):.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _blocks(found: Mapping[str, Any], key: str) -> list[Blocks]:
    """The two-way model of each size."""
    out = []
    for size in dict.fromkeys(row["size"] for row in found["statistics"]):
        values = [row["seeds"] for row in found["statistics"] if (row["size"], row["metric"]) == (size, key)]
        common = set.intersection(*map(set, values))
        out.append(blocks([[own[seed] for seed in sorted(common)] for own in values]))
    return [each for each in out if each is not None]


def _against(found: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return [row for row in found["statistics"] if row["metric"] == key and row["against"] is not None]


def floor(tokens: int, experts: int, top_k: int, draws: int = 1000) -> tuple[float, float]:
    """MaxVio of tokens that each choose `top_k` experts at random, all alike: its mean, and that mean's standard error.

    Each expert's expected load is the same, so all that is left is chance. Tokens of real text are not independent:
    for them the floor is somewhat higher.
    """
    generator = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        values = generator.random((tokens, experts), dtype=np.float32)
        chosen = np.argpartition(values, top_k - 1, axis=1)[:, :top_k]
        load = np.bincount(chosen.ravel(), minlength=experts)
        found.append(load.max() * experts / (tokens * top_k) - 1)
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(draws))


def _floor() -> str:
    lines = ["| where loads are counted | tokens | experts, top-k | MaxVio by chance |", "|---|---|---|---|"]
    for where, (tokens, experts, top_k) in COUNTED.items():
        draws = 1000 if tokens < 10000 else 40
        mean, error = floor(tokens, experts, top_k, draws)
        lines.append(f"| {where} | {tokens:,} | {experts}, {top_k} | {mean:.3f} ± {2 * error:.3f} |")
    return "\n".join(lines) + "\n"


def _skewed() -> str:
    """`benchmarks/hf_balance.py` of a skewed start: steps until balanced, against the method of the registration."""
    found = json.loads((RESULTS.parent / "hf_skewed.json").read_text(encoding="utf-8"))
    steps, loss = {}, {}
    for run in found["runs"]:
        after = found["settings"]["steps"] if run["balanced_after"] is None else run["balanced_after"]
        steps.setdefault(run["method"], {})[run["seed"]] = float(after)
        loss.setdefault(run["method"], {})[run["seed"]] = run["eval_loss"]

    def against(values: Mapping[str, Mapping[int, float]], method: str, other: str) -> Paired:
        return paired([values[method][seed] - values[other][seed] for seed in values[other]])

    tests = {method: against(steps, method, SKEWED) for method in steps if method != SKEWED}
    corrected = dict(zip(tests, holm([1.0 if test.p is None else test.p for test in tests.values()]), strict=True))
    lines = [
        f"| method | steps until MaxVio < 0.5 | never | against {SKEWED} | p (Holm) | serving MaxVio | dead of 64 "
        "| nats/byte against none |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        method = row["method"]
        cells = [
            f"`{method}`",
            Estimate.of(list(steps[method].values())).text(1),
            f"{row['balanced_after'].count(None)}",
        ]
        if method == SKEWED:
            cells += ["", ""]
        else:
            told = tests[method].difference.text(1, sign=True)
            cells += [f"**{told}**" if corrected[method] < LEVEL else told, chance(corrected[method])]
        cells += [_spread(row["max_vio_serving"], 2), _spread(row["dead"], 1)]
        cells.append("" if method == "none" else against(loss, method, "none").difference.text(3, sign=True))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _known() -> set[str]:
    return {path.stem for path in RESULTS.glob("*.json")}


ACROSS = {
    "leaderboard-loss": lambda: study_leaderboard.summary(read, _known()),
    "leaderboard-balance": lambda: study_leaderboard.summary(read, _known(), balance=True),
    "registered": lambda: study_tests.registered(read, _known()),
    "words-together": lambda: study_tests.together(read, ["words", "words-more"]),
    "compute": _compute,
    "power": _power,
    "floor": _floor,
    "skewed": _skewed,
}


def _keep(folder: Path) -> str:
    plan, path = _study(folder.name, str(folder)), RESULTS / "kept" / f"{folder.name}.jsonl"
    cells, new = keep(plan, path)
    kb = path.stat().st_size / 1000
    told = f"{cells} of {len(plan.cells)} cells, {new} of them new; {kb:.0f} kB, {kb / max(cells, 1):.1f} a cell"
    return f"{path.relative_to(ROOT)}: {told}"


def _restore(name: str, folder: str | None = None) -> str:
    plan, path = _study(name, folder), RESULTS / "kept" / f"{name}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.jsonl"))) or "nothing"
        raise SystemExit(
            f"restore: nothing is kept of {name!r}; kept: {there}. `sinkroute compare study/{name}` runs it, "
            f"`python scripts/study.py keep {plan.out}` keeps what is finished"
        )
    laid, left = restore(plan, path)
    told = f"; {len(left)} left as they are, a run is there" if left else ""
    return f"{plan.out}: {len(laid)} of {len(plan.cells)} cells laid out{told}"


def _study(name: str, out: str | None) -> Plan:
    path = find_study(f"study/{name}")
    return expand(path, read_study(path), out=out)


def page(text: str) -> str:
    """A page with its tables written anew."""
    return MARK.sub(lambda mark: f"{mark[1]}{table(mark['name'])}{mark[3]}", text)


def main(words: list[str]) -> int:
    if words[:1] == ["collect"] and len(words) > 1:
        for word in words[1:]:
            print(collect(Path(word)).relative_to(ROOT))
    elif words[:1] == ["keep"] and len(words) > 1:
        for word in words[1:]:
            print(_keep(Path(word)))
    elif words[:1] == ["restore"] and len(words) in (2, 3):
        print(_restore(*words[1:]))
    elif words == ["pages"]:
        for path in PAGES:
            path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
            print(path.relative_to(ROOT))
    elif words in (["power"], ["floor"]):
        print(table(words[0]), end="")
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
