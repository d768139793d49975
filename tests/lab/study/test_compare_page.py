"""The page, and what its figures are drawn from."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.compare_page import write_page
from sinkroute.lab.study.figures import grids
from sinkroute.lab.study.results import Results, gather
from sinkroute.lab.study.state import record_failure

from .conftest import finish


@pytest.fixture
def full(plan: Callable[..., Plan]) -> Results:
    """Two sizes, a grid, a failure, and words that want to be markup."""
    methods = {
        "vanilla": {"router": {"name": "softmax"}},
        "<b>x</b> & $y$": {"router": {"name": "ssr-l"}},
        "ssr-s": {
            "router": {"name": "ssr-s"},
            "grid": {"router.options.noise": [0.1, 1, 10], "router.options.draw": ["step", "layer"]},
        },
    }
    sizes = {"s": {}, "t": {"model": {"d_model": 64}}}
    found = plan(title="<script>alert(1)</script>", methods=methods, sizes=sizes, seeds=[0, 1, 2], reference="vanilla")
    for index, cell in enumerate(found.cells):
        if index == 5:
            record_failure(found.out / cell.name, cell.hash, "<img src=x>")
        else:
            active = 1000 * (1 + (cell.size == "t"))
            finish(cell, found.out, 3 + 0.01 * (index % 7), parameters={"total": 3000, "active": active})
    return gather(found)


def test_the_page_is_whole_self_contained_and_escaped(full: Results, tmp_path: Path) -> None:
    page = write_page(full, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;img src=x&gt;" in page
    assert "<b>x</b>" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert "url(http" not in page
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    # Differences: 2 sizes × 5 metrics; grids: 2 sizes; gains over size: 1.
    assert len(figures) == 13
    for figure in figures:
        ET.fromstring(figure)
    assert "$y$" in "".join(figures[0])


def test_a_page_before_the_first_run_is_done_says_so(plan: Callable[..., Plan], tmp_path: Path) -> None:
    page = write_page(gather(plan()), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No run is done yet" in page
    assert "<svg" not in page


def test_one_seed_is_drawn_too(plan: Callable[..., Plan], tmp_path: Path) -> None:
    found = plan(seeds=[0])
    for cell in found.cells:
        finish(cell, found.out, 3.0)
    assert "<svg" in write_page(gather(found), tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_grid_has_its_longest_numeric_axis_and_a_line_for_all_else(full: Results) -> None:
    (grid,) = grids(full)
    assert (grid.family, grid.key) == ("ssr-s", "router.options.noise")
    assert set(grid.lines) == {"draw=step", "draw=layer"}
    assert [value for value, _ in grid.lines["draw=step"]] == [0.1, 1, 10]


def test_a_grid_of_words_has_no_axis(plan: Callable[..., Plan]) -> None:
    methods = {"a": {"router": {"name": "ssr-l"}, "grid": {"router.options.draw": ["step", "layer"]}}}
    assert grids(gather(plan(methods=methods))) == []
