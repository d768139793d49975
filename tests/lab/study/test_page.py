"""The page and the picture of a comparison, of a plan and of runs that somebody names."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sinkroute.lab import files
from sinkroute.lab.study import page
from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.figures import grids
from sinkroute.lab.study.page import write_page, write_picture
from sinkroute.lab.study.results import Results, compare_runs, gather
from sinkroute.lab.study.runs import read_runs
from sinkroute.lab.study.state import record_failure

from .conftest import finish

MakeRun = Callable[..., Path]
_VOID = {"meta", "br", "hr", "img", "link", "input"}


class Outline(HTMLParser):
    """Collects what a browser would fetch, the ids, and whether the tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in _VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset")]
        self.ids += [value or "" for key, value in attrs if key == "id"]


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def compared(folder: Path) -> Results:
    return compare_runs(read_runs(folder))


def test_the_page_is_self_contained_and_well_formed(demo: Path, tmp_path: Path) -> None:
    path = write_page(compared(demo), tmp_path / "out" / "report.html")
    text = path.read_text(encoding="utf-8")
    found = outline(text)
    assert path == tmp_path / "out" / "report.html"
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in found.fetched)
    assert not {"script", "link", "iframe", "img"} & found.tags
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert len(found.ids) == len(set(found.ids))
    assert {target[1:] for target in found.fetched if target.startswith("#")} <= set(found.ids)


def test_the_page_shows_the_numbers_and_the_headline_of_the_table(demo: Path, tmp_path: Path) -> None:
    text = write_page(compared(demo), tmp_path / "r.html").read_text(encoding="utf-8")
    assert '<b class="best">3.020</b>' in text
    assert "<td>3.060</td>" in text
    assert "SSR-S has the lowest valid bits/byte: 3.020." in text
    assert "With one seed there is neither interval nor test" in text
    assert "0123456789ab" in text and "0123456789abc" not in text  # the checksum, shortened
    assert "5,480,771 train bytes" in text and "torch 2.13.0" in text
    assert "4<small>(p=0.1)</small>" in text


def test_every_text_of_a_run_is_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    make_run(tmp_path, "a", evil, f"{evil}&\"'$x^{{", options={"note": evil, evil: 1})
    make_run(tmp_path, "b", "softmax", "Vanilla", finished=False, lines=1)
    baselines: dict[str, Any] = {
        evil: {"bits_per_byte": 3.0},
        "corpus": {"name": evil, "sha256": evil, "train": 10},
        "machine": {"cpu": evil, "torch": evil},
    }
    text = write_page(compare_runs(read_runs(tmp_path), evil, baselines), tmp_path / "r.html").read_text(
        encoding="utf-8"
    )
    assert "script" not in outline(text).tags and "<script" not in text.lower()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_configurations_are_shown_and_their_differences_listed(demo: Path, tmp_path: Path) -> None:
    text = write_page(compared(demo), tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count("<details>") == 4  # of each method the first run
    assert "name: wikipedia" in text
    assert '<th scope="col">router.name</th>' in text
    assert '<th scope="col">train.lr</th>' not in text


def test_an_interrupted_run_is_tagged_on_the_page(demo: Path, make_run: MakeRun, tmp_path: Path) -> None:
    make_run(demo, "z", "z-loss", "Z-loss", finished=False, lines=3)
    text = write_page(compared(demo), tmp_path / "r.html").read_text(encoding="utf-8")
    assert '<span class="tag">interrupted at step 30 of 40</span>' in text


def test_a_report_without_any_finished_run_is_written(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", finished=False, lines=0)
    make_run(tmp_path, "b", "ssr-s", "SSR-S", finished=False, lines=1)
    text = write_page(compared(tmp_path), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "No run has finished yet" in text and "interrupted at step 0 of 40" in text
    write_picture(compared(tmp_path), tmp_path / "p.png")


def test_a_diverged_run_shows_nan(demo: Path, make_run: MakeRun, tmp_path: Path) -> None:
    make_run(demo, "z", "z-loss", "Z-loss", bits=math.nan, loss=math.nan)
    text = write_page(compared(demo), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "diverged: loss not finite at step 10" in text


def test_seeds_are_averaged_on_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, f"r{seed}", "softmax", "Vanilla", seed=seed, bits=3.0 + 0.1 * seed)
    text = write_page(compared(tmp_path), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "3.100<small>± 0.248</small>" in text and "3 seeds each" in text


def test_the_same_runs_write_the_same_bytes(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    found = compared(demo)
    first = write_page(found, tmp_path / "a.html").read_bytes()
    assert first == write_page(found, tmp_path / "b.html").read_bytes()
    assert b"1 January 1970" in first
    for suffix in (".png", ".svg"):
        one = write_picture(found, tmp_path / f"a{suffix}").read_bytes()
        assert one == write_picture(found, tmp_path / f"b{suffix}").read_bytes()


def test_a_page_that_fails_leaves_the_old_one_and_no_leftovers(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    path = write_page(compared(demo), out / "r.html")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_page(compared(demo), path)
    assert path.read_bytes() == before and list(out.iterdir()) == [path]


def test_pictures_are_png_and_svg_and_no_other_format(demo: Path, tmp_path: Path) -> None:
    found = compared(demo)
    assert write_picture(found, tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in write_picture(found, tmp_path / "p.svg").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg; it ends in '\.jpg'"):
        write_picture(found, tmp_path / "p.jpg")


def test_bad_arguments_say_what_to_pass(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        write_page(compared(demo), tmp_path)
    with pytest.raises(ValueError, match=r"must end in \.html"):
        write_page(compared(demo), tmp_path / "r.pdf")


def test_a_full_demo_stays_small(make_run: MakeRun, tmp_path: Path) -> None:
    for i, method in enumerate(["softmax", "load-balance", "z-loss", "sinkhorn", "ssr-l", "ssr-s"]):
        folder = make_run(tmp_path, method, method, method, bits=3 + i / 100)
        lines = [
            {
                "kind": "train",
                "step": 10 * n,
                "loss": 2 + 1 / n,
                "max_vio": [0.1 * i + 1 / n] * 4,
                "load": [[(n * 7 + e * 13 + i) % 50 + 1 for e in range(8)]] * 4,
                "branches": {"softmax": 30, "sinkhorn": n % 3},
            }
            for n in range(1, 41)
        ]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    path = write_page(compared(tmp_path), tmp_path / "r.html")
    assert path.stat().st_size < 1_000_000
    assert len(re.findall("data:image/png", path.read_text(encoding="utf-8"))) == 6 * 4 + 1


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys, sinkroute.lab.study; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    path = str(Path(page.__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path, "PATH": ""}, check=False)
    assert done.returncode == 0


def test_the_page_says_that_all_else_is_the_same_only_after_it_has_looked(
    demo: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    alike = write_page(compared(demo), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "per routing method; all else is the same." in alike
    make_run(demo, "wider", "softmax", "Wider", config={"model": {"layers": 2, "experts": 4, "top_k": 3}})
    apart = write_page(compared(demo), tmp_path / "r.html").read_text(encoding="utf-8")
    assert "per routing method; under each heading all else is the same." in apart
    assert "<h3>top_k=2: 1,234,567 parameters, 345,678 active</h3>" in apart
    assert "<dd>headings</dd>" in apart


def test_what_methods_of_a_plan_differ_in_beside_the_router_is_said(plan: Callable[..., Plan], tmp_path: Path) -> None:
    methods = {"vanilla": {"router": {"name": "softmax"}}, "wide": {"model": {"d_hidden": 99}}}
    found = plan(methods=methods, seeds=[0], reference="vanilla")
    for cell in found.cells:
        finish(cell, found.out, 3.0)
    text = write_page(gather(found), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "the methods differ in model.d_hidden too" in text and "all else is the same" not in text


def test_figures_of_one_page_share_no_id(demo: Path, make_run: MakeRun, tmp_path: Path) -> None:
    make_run(demo, "longer", "softmax", "Vanilla", config={"train": {"steps": 80, "lr": 0.003}})
    found = outline(write_page(compared(demo), tmp_path / "r.html").read_text(encoding="utf-8"))
    assert len(found.ids) == len(set(found.ids))
    assert {target[1:] for target in found.fetched if target.startswith("#")} <= set(found.ids)


# -- of a plan ---------------------------------------------------------------------------------------------------


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


def test_the_page_of_a_plan_is_whole_self_contained_and_escaped(full: Results, tmp_path: Path) -> None:
    text = write_page(full, tmp_path / "page.html").read_text(encoding="utf-8")
    found = outline(text)
    assert not {"script", "img", "link", "iframe"} & found.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;img src=x&gt;" in text
    assert "<b>x</b>" not in text
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in found.fetched)
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    # Differences: 2 sizes × 4 metrics (not times); grids: 2 sizes; gains over size: 1; of the runs: 2 sizes × 6.
    assert len(figures) == 23
    for figure in figures:
        ET.fromstring(figure)
    assert "$y$" in "".join(figures)


def test_a_page_before_the_first_run_is_done_says_so(plan: Callable[..., Plan], tmp_path: Path) -> None:
    text = write_page(gather(plan()), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No run is done yet" in text
    assert "<svg" not in text


def test_a_grid_has_its_longest_numeric_axis_and_a_line_for_all_else(full: Results) -> None:
    (grid,) = grids(full)
    assert (grid.family, grid.key) == ("ssr-s", "router.options.noise")
    assert set(grid.lines) == {"draw=step", "draw=layer"}
    assert [value for value, _ in grid.lines["draw=step"]] == [0.1, 1, 10]


def test_a_grid_of_words_has_no_axis(plan: Callable[..., Plan]) -> None:
    methods = {"a": {"router": {"name": "ssr-l"}, "grid": {"router.options.draw": ["step", "layer"]}}}
    assert grids(gather(plan(methods=methods))) == []
