"""Each kind of table that commands print, at the widths of terminals: no number is lost without being named."""

from __future__ import annotations

from typing import Any

import pytest

from sinkroute.lab.bench import Size, size_table
from sinkroute.lab.models.listing import list_models, model_table
from sinkroute.lab.screen import ScreenTable

from .test_screen import left_out, printed, whole


def assert_no_number_is_lost(table: ScreenTable, width: int) -> None:
    """Piped and in a terminal; a number is what holds a digit."""
    for terminal in (False, True):
        lines = printed(table, width, terminal)
        assert max(len(line.rstrip()) for line in lines) <= width
        out, seen = left_out(lines), whole(lines)
        for place, column in enumerate(table.columns):
            if place and column.name in out:
                continue
            numbers = {
                word for cells, _ in table.rows for word in cells[place].plain.split() if any(map(str.isdigit, word))
            }
            assert numbers <= seen, column


WIDTHS = pytest.mark.parametrize("width", [60, 80, 120])


@WIDTHS
def test_models(width: int) -> None:
    assert_no_number_is_lost(model_table(list_models()), width)


@WIDTHS
def test_bench(width: int) -> None:
    names = ["softmax", "softmax again", *(f"a router with a rather long name, {place}" for place in range(9))]
    figures: dict[str, Any] = {
        "turns": 7,
        "softmax_ms": 123.456,
        "ratios": {name: [1.001 * place, 1.25, 123.125] for place, name in enumerate(names, start=1)},
        "extra_mb": {name: 2000.0 + place for place, name in enumerate(names)},
        "refused": {"another": "top-1 only; set top_k=1"},
    }
    machine = {"cpu": "a CPU with a very long name that stands below the table", "gpu": None, "torch": "2.13"}
    content = {"sizes": {"64x4x2": figures}, "machine": machine, "settings": {"threads": 1}}
    assert_no_number_is_lost(size_table(Size(64, 4, 2), content), width)
