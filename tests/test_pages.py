"""Pages that teach: their code runs and prints what they say, their pictures are those that the script draws."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d+(\.\d+)?")


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def run(name: str) -> None:
    """All code of a page, in one name space."""
    names: dict[str, object] = {}
    for language, block in FENCE.findall(page(name)):
        if language == "python":
            exec(compile(block, f"docs/{name}.md", "exec"), names)


def test_the_code_of_how_it_works_holds() -> None:
    run("how-it-works")


def test_the_start_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    run("start")
    printed = capsys.readouterr().out
    shown = "".join(block for language, block in FENCE.findall(page("start")) if not language)
    for line in filter(lambda line: line != "...", shown.splitlines()):
        assert NUMBER.sub("#", line.removesuffix("...").rstrip()) in NUMBER.sub("#", printed)
    assert shown.splitlines()[0] in printed  # of drawn logits, which are the same everywhere
    assert int(re.findall(r"busiest (\d+)", printed)[1]) <= 517
    last = re.findall(r"^step 99 .* MaxVio ([\d.]+)  dead (\d+)$", printed, flags=re.MULTILINE)
    assert float(last[0][0]) < 0.5 and last[0][1] == "0"


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures_of_the_site", ROOT / "scripts" / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(path: Path) -> list[str]:
    return [element.text or "" for element in ET.parse(path).iter() if element.tag.endswith("}text")]


@pytest.mark.parametrize("name", ["plan", "potentials", "passes", "loads"])
def test_a_picture_says_what_the_script_draws_and_is_small(name: str, pictures: ModuleType, tmp_path: Path) -> None:
    kept = ROOT / "docs" / "pictures" / f"{name}.svg"
    for copy in ("one.svg", "other.svg"):
        pictures.draw(name, tmp_path / copy)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    assert words(tmp_path / "one.svg") == words(kept) != []
    assert kept.stat().st_size <= 60_000


def test_each_picture_is_there_and_shown(pictures: ModuleType) -> None:
    assert set(pictures.PICTURES) == set(re.findall(r"pictures/(\w+)\.svg", page("how-it-works")))
    texts = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert [path.name for path in (ROOT / "docs" / "pictures").iterdir() if f"pictures/{path.name}" not in texts] == []


def test_the_solver_converges_as_the_page_says(pictures: ModuleType) -> None:
    logits_TE = pictures.skewed(4096, 8, 1.5)
    assert pictures.solve(logits_TE, reg=0.1, tol=1e-6, max_passes=7).converged
    assert pictures.solve(logits_TE, reg=0.1, method="sinkhorn", max_passes=9).column_error > 0.1


def test_the_kept_seeds_are_as_skewed_as_the_page_says(pictures: ModuleType) -> None:
    for method, told in (("vanilla", [2.3, 5.8]), ("ssr-dual", [1.0, 1.0])):
        logs = [pictures.kept_loads(f"0.006-{method}-seed{seed}")[1][-1] for seed in range(60, 68)]
        assert [
            round(float(value), 1) for value in np.mean([loads_LE.max(axis=1) for loads_LE in logs], axis=0)
        ] == told


def test_who_asks_for_less_motion_has_none() -> None:
    text = (ROOT / "docs" / "pictures" / "passes.svg").read_text(encoding="utf-8")
    assert "@media (prefers-reduced-motion:reduce){rect,text{animation:none!important}}" in text


def test_figures_of_loads_are_those_of_the_pictures(pictures: ModuleType) -> None:
    told = re.search(r"masses of ([\d., and\n]+) and\s+loads of ([\d, and\n]+)\. By", page("how-it-works"))
    assert told is not None
    shown = words(ROOT / "docs" / "pictures" / "plan.svg")
    assert all(number in shown for part in told.groups() for number in re.findall(r"[\d.]+", part))


def test_every_word_of_the_glossary_is_told_in_a_sentence_or_two() -> None:
    terms = dict(re.findall(r"^### (.+)\n\n((?:.+\n)+)", page("glossary"), flags=re.MULTILINE))
    assert len(terms) == page("glossary").count("\n### ") >= 40
    assert {name for name, text in terms.items() if not 20 < len(text) < 320} == set()


def test_every_figure_of_the_table_of_costs_has_a_command() -> None:
    summary, _, rest = page("costs").partition("\n## ")
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \| (.+) \|$", summary, flags=re.MULTILINE)[1:]
    assert len(rows) >= 10
    for _, figure, command, more in rows:
        assert re.search(r"\d", figure) or "one" in figure
        assert re.fullmatch(r"`(make|python|sinkroute) .+`", command)
        where = re.fullmatch(r"\[.+\]\((?:([\w-]+)\.md)?(?:#.+)?\)", more)
        assert where is not None
        there = set(re.findall(r"[\d.]+\d", page(where[1]) if where[1] else rest))
        assert set(re.findall(r"\d+\.\d+", figure)) <= there, figure
        for script in re.findall(r"python (\S+\.py)", command):
            assert (ROOT / script).exists()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {command for row in rows for command in re.findall(r"make (\S+)`", row[2])} <= set(targets)
