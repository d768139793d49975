"""The look at pages sees what is wrong, and nothing where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from .browser import Browser

WIDE = '<div style="width: 2000px">a long table</div>'
FAULTS = {
    "the page is": f"<p>words</p>{WIDE}",
    "scrolls without a hint": f'<div style="overflow-x: auto">{WIDE}</div>',
    "cut": f'<div style="overflow-x: hidden">{WIDE}</div>',
    "outside its box": '<svg viewBox="0 0 100 20" width="200"><text x="90" y="15">beyond the edge</text></svg>',
    "too small": '<svg viewBox="0 0 100 20" width="200" height="40"><text x="1" y="9" font-size="4">small</text></svg>',
    "on other words": '<svg viewBox="0 0 150 20" width="300" height="40"><text x="1" y="15">one</text>'
    '<text x="3" y="15">two</text></svg>',
    "pale": '<p style="color: #999">words</p>',
}


def look(chromium: Browser, folder: Path, body: str) -> str:
    page = folder / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><body style="background: #fff; color: #000">{body}')
    chromium.open(page, width=400)
    return chromium.faults()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_seen(fault: str, chromium: Browser, tmp_path: Path) -> None:
    assert look(chromium, tmp_path, FAULTS[fault]).startswith(fault)


def test_a_page_without_faults_has_none(chromium: Browser, tmp_path: Path) -> None:
    assert look(chromium, tmp_path, "<h1>A title</h1><p>Some words that are read.</p>") == ""
