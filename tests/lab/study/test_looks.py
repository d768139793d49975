"""How the pages of studies look in a browser: nothing is cut, pale, or too small, on a telephone and on a desk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.page import write_page
from sinkroute.lab.study.results import compare_runs, gather
from sinkroute.lab.study.runs import read_runs
from sinkroute.lab.study.state import record_failure

from ..browser import Browser
from .conftest import finish

METHODS = {
    "softmax": "Vanilla softmax",
    "load-balance": "Load-balance",
    "z-loss": "Z-loss",
    "sinkhorn": "Sinkhorn",
    "ssr-l": "SSR-L",
    "ssr-s": "SSR-S with a long name",
    "ssr-dual": "SSR-Dual",
}


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_report(
    seeds: int, chromium: Browser, make_run: Callable[..., Path], baselines: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    for place, (method, label) in enumerate(METHODS.items()):
        chance = 0.1 if method.startswith("ssr-") else None
        for seed in range(seeds):
            bits = 3 + place / 50 + (seed - 1) / 40
            folder = make_run(root, f"{method}-{seed}", method, label, seed=seed, bits=bits, probability=chance)
            lines = [
                {
                    "kind": "train",
                    "step": 10 * n,
                    "loss": 2 + 1 / n + bits / 90,
                    "max_vio": [0.1 * place + 1 / n] * 4,
                    "load": [[1 + (n * 7 + e * 13 + place) % 50 if e else 2 ** (n % 9) for e in range(8)]] * 4,
                    "branches": {"softmax": 30, "sinkhorn": n % 3 if chance else 0},
                }
                for n in range(1, 41)
            ]
            (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    make_run(root, "stopped", "loss-free", "Loss-free", finished=False, lines=2)
    write_page(compare_runs(read_runs(root), baselines=baselines), tmp_path / "report.html")
    assert chromium.look(tmp_path / "report.html") == ""


def test_the_report_before_any_run_is_finished(
    chromium: Browser, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", finished=False, lines=0)
    write_page(compare_runs(read_runs(tmp_path)), tmp_path / "report.html")
    assert chromium.look(tmp_path / "report.html") == ""


def test_the_page_of_a_comparison(chromium: Browser, plan: Callable[..., Plan], tmp_path: Path) -> None:
    methods = {
        "vanilla": {"router": {"name": "softmax"}},
        "ssr-l with a longer name": {"router": {"name": "ssr-l"}},
        "ssr-s": {
            "router": {"name": "ssr-s"},
            "grid": {"router.options.noise": [0.1, 1, 10], "router.options.draw": ["step", "layer"]},
        },
    }
    sizes = {"small": {}, "twice": {"model": {"d_model": 64}}}
    found = plan(title="Which router?", methods=methods, sizes=sizes, seeds=[0, 1, 2], reference="vanilla")
    for index, cell in enumerate(found.cells):
        if index == 5:
            record_failure(found.out / cell.name, cell.hash, "a reason")
        else:
            active = 1000 * (1 + (cell.size == "twice"))
            finish(cell, found.out, 3 + 0.01 * (index % 7), parameters={"total": 3000, "active": active})
    write_page(gather(found), tmp_path / "page.html")
    assert chromium.look(tmp_path / "page.html") == ""
