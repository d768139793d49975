"""Heat maps of loads: what a cell shows and says."""

from __future__ import annotations

import re

import pytest

from sinkroute.lab.page.heat import bars_svg, heat_svg

CELL = re.compile(r'<g class="cell( dead)?"><title>([^<]*)</title><rect [^>]*fill="([^"]*)" fill-opacity="([^"]*)"/>')


def test_a_cell_is_the_busiest_of_its_experts_and_tells_the_dead() -> None:
    loads = [1.0] * 600
    loads[300], loads[301] = 3.0, 0.001
    cells = CELL.findall(heat_svg([("0", loads)], "loads"))
    assert len(cells) == 200
    assert cells[100] == (" dead", "layer 0, expert 300: 3.00 of a fair share; a dead one among 3", "#d9580a", "1.00")
    assert {opacity for _, _, _, opacity in cells[:100]} == {"0.00"}


def test_layers_of_different_sizes_stand_in_one_map() -> None:
    svg = heat_svg([("first", [2.0, 0.0]), ("second", [1.0] * 4)], "a < b")
    assert [dead for dead, *_ in CELL.findall(svg)] == ["", " dead", *[""] * 4]
    assert 'aria-label="a &lt; b"' in svg


def test_nothing_is_drawn_of_nothing() -> None:
    assert heat_svg([], "") == bars_svg([]) == ""


@pytest.mark.parametrize("top", [2.0, 40.0])
def test_the_largest_load_has_the_full_colour(top: float) -> None:
    cells = CELL.findall(heat_svg([("0", [top, 1.0, 0.5])], "loads"))
    assert [opacity for *_, opacity in cells] == ["1.00", "0.00", "0.50"]
