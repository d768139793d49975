"""What was tried on patched models, told by the tests that tried it: the tables of docs/huggingface.md.

python -m tests.adapters.hf.tried    # writes them
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["PAGE", "TRIED", "Row", "told", "tried", "written"]

PAGE = Path(__file__).parents[3] / "docs" / "huggingface.md"
_THREAD = re.compile(r"([\w.-]+/[\w.-]+)#(\d+)")


class Row(NamedTuple):
    """What a test tried and found; `thread`, "owner/repository#number", is the public report that it replays."""

    what: str
    found: str
    thread: str | None


TRIED: list[Row] = []


def tried(what: str, found: str) -> Callable[[Any], Any]:
    """Marks a test as a row of the page. A public report that it replays is named in the test's docstring."""

    def mark(test: Any) -> Any:
        thread = _THREAD.search(test.__doc__ or "")
        TRIED.append(Row(what, found, thread and thread.group()))
        return test

    return mark


def told(rows: list[Row]) -> dict[str, str]:
    """Name of the table → it, in Markdown."""
    situations = [f"| {row.what} | {row.found} |" for row in rows if row.thread is None]
    reports = [f"| {row.what} | {row.found} | {_link(row.thread)} |" for row in rows if row.thread is not None]
    return {
        "situations": "\n".join(["| tried | found |", "|---|---|", *situations]),
        "reports": "\n".join(["| reported elsewhere | patched | thread |", "|---|---|---|", *reports]),
    }


def written(text: str, tables: dict[str, str]) -> str:
    """The page with these tables in the place of those that it has."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: from the tests -->\n", f"\n<!-- {name} end -->"
        before, found, rest = text.partition(begin)
        assert found and end in rest, f"{PAGE.name} has no place for {name}"
        text = before + begin + table + end + rest.partition(end)[2]
    return text


def _link(thread: str) -> str:
    repository, _, number = thread.partition("#")
    return f"[{thread}](https://github.com/{repository}/issues/{number})"


if __name__ == "__main__":
    from . import test_reports, test_situations

    assert test_reports.tried is test_situations.tried  # of the module, which is not this run of it
    rows = test_reports.TRIED
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), told(rows)), encoding="utf-8")
