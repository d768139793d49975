"""The built site in a browser: words stand out, nothing is wider than a telephone, the keyboard gets everywhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lab.browser import MISSING, Browser, browser

ROOT = Path(__file__).parents[1]
PAGES = ("start", "how-it-works", "which-router", "study", "api/sinkroute")
OWN = ROOT / ".venv-docs" / "bin" / "python"  # of `make docs`
PYTHON = str(OWN) if OWN.exists() else sys.executable if importlib.util.find_spec("sphinx") else None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs Sphinx: make .venv-docs/.installed"),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

UNTOLD = (
    """return [...document.images].filter(image => !image.alt.trim() || !image.naturalWidth).map(image => image.src)"""
)
FOCUS = """
const element = document.activeElement, box = element.getBoundingClientRect(), style = getComputedStyle(element);
return {what: element.className + " " + element.textContent.trim(), seen: box.left >= 0 && box.right <= innerWidth,
  ring: style.outlineStyle !== "none" || style.boxShadow !== "none"};
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [str(PYTHON), str(ROOT / "scripts" / "docs.py"), "--out", str(out)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    return out / "html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.mark.parametrize("page", PAGES)
def test_words_stand_out_and_nothing_is_cut_or_too_wide(page: str, site: Path, chromium: Browser) -> None:
    found = chromium.look(site / f"{page}.html").splitlines()
    # Code and tables scroll by their bars, as on every site of this theme; a line of a fault's text may break.
    kinds = ("the page is", "cut:", "outside its box:", "too small:", "on other words:", "pale:")
    assert [line for line in found if line.startswith(kinds)] == []
    assert chromium.run(UNTOLD) == []


def test_a_pale_word_of_the_site_would_be_found(site: Path, chromium: Browser) -> None:
    chromium.open(site / "start.html")
    chromium.run("document.querySelector('article p').style.color = '#999'")
    assert "pale: <p" in chromium.faults()


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("page", PAGES)
def test_the_keyboard_comes_to_the_search_and_to_the_pages(
    page: str, width: int, site: Path, chromium: Browser
) -> None:
    chromium.open(site / f"{page}.html", width=width)
    stops = []
    for _ in range(12):
        chromium.press("Tab")
        stops.append(chromium.run(FOCUS))
    assert stops[0]["what"].endswith("Skip to content")
    search, link = (
        next(stop for stop in stops if words in stop["what"]) for words in ("sidebar-search", "Five minutes")
    )
    assert all(stop["ring"] for stop in stops)
    assert search["seen"] and link["seen"]


def test_the_search_finds_a_word_without_a_network(site: Path, chromium: Browser) -> None:
    chromium.open(f"{(site / 'search.html').as_uri()}?q=potentials")
    found = "return [...document.querySelectorAll('#search-results li a')].map(link => link.href)"
    for _ in range(50):
        chromium.settled()
        if any(address.split("#")[0].endswith("/dual.html") for address in chromium.run(found)):
            return
    pytest.fail(f"not found, only {chromium.run(found)}")
