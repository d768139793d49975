"""The table for terminals: at any width its numbers are whole, or their column is named as left out."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from sinkroute.lab.screen import Column, ScreenTable


def printed(table: object, width: int, terminal: bool = False) -> list[str]:
    """The lines as they are seen, without colours."""
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False).print(table)
    return file.getvalue().splitlines()


def left_out(lines: list[str]) -> str:
    """The sentence of what is left out, in one line; "" without one."""
    found = re.search(r"\d+ columns? left out .*? shows all", " ".join(" ".join(lines).split()))
    return found.group() if found else ""


def whole(lines: list[str]) -> set[str]:
    return set(" ".join(lines).split())


WORDS = st.text("abcdefg -_", min_size=1, max_size=40)
NUMBERS = st.one_of(
    st.floats(-1e9, 1e9).map(lambda value: f"{value:.4f}"),
    st.integers(0, 10**12).map(lambda value: f"{value:,}"),
    st.floats(0, 1).map(lambda value: f"{value:.1%}"),
)
COLUMNS = st.lists(st.tuples(WORDS, st.integers(0, 3), st.booleans()), min_size=1, max_size=12)


@given(st.data(), COLUMNS, st.sampled_from([60, 80, 120]), st.booleans())
def test_no_number_is_lost_unless_its_column_is_named(
    data: st.DataObject, columns: list[tuple[str, int, bool]], width: int, terminal: bool
) -> None:
    table = ScreenTable(
        [Column("label", words=True), *(Column(f"c{i} {title}", m, w) for i, (title, m, w) in enumerate(columns))],
        title="a title of some words",
    )
    numbers: dict[int, list[str]] = {place: [] for place in range(1, len(table.columns))}
    for _ in range(data.draw(st.integers(1, 4))):
        cells = [data.draw(WORDS if column.words else NUMBERS) for column in table.columns]
        table.add(*cells)
        for place, found in numbers.items():
            found += [] if table.columns[place].words else [cells[place]]
    lines = printed(table, width, terminal)
    assert max(map(len, lines)) <= width
    out, tokens = left_out(lines), whole(lines)
    for place, found in numbers.items():
        if table.columns[place].name not in out:
            assert set(found) <= tokens


@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.integers(20, 100))
def test_what_is_left_out_matters_least_and_stands_furthest_right(matters: list[int], width: int) -> None:
    table = ScreenTable([Column("label", words=True), *(Column(f"c{i}", m) for i, m in enumerate(matters))])
    table.add("a", *["123456789"] * len(matters))
    shown = table.shown(width)
    ranks = [(column.matters, -place) for place, column in enumerate(table.columns)]
    out = [place for place in range(len(table.columns)) if place not in shown]
    assert shown[0] == 0
    assert all(ranks[one] > ranks[other] for one in shown[1:] for other in out)


def test_all_is_shown_at_the_width_that_the_sentence_names() -> None:
    table = ScreenTable([Column("label", words=True), *(Column(f"number {i}") for i in range(9))], elsewhere="--json")
    table.add("a rather long label of a method", *(f"{1000 + i}.5" for i in range(9)))
    sentence = left_out(printed(table, 60))
    assert sentence.startswith("5 columns left out for the width: number 4, ") and "or --json shows all" in sentence
    wide = int(re.search(r"COLUMNS=(\d+)", sentence).group(1))  # type: ignore[union-attr]
    assert left_out(printed(table, wide)) == ""
    assert left_out(printed(table, wide - 1)) != ""


def test_words_are_folded_before_a_number_is_left_out() -> None:
    table = ScreenTable([Column("label", words=True), Column("value")])
    table.add("words that are longer than the terminal is wide", "3.25")
    lines = printed(table, 24)
    assert left_out(lines) == "" and "3.25" in whole(lines) and max(map(len, lines)) <= 24


def test_a_cell_of_two_lines_keeps_both() -> None:
    table = ScreenTable([Column("label", words=True), Column("value")])
    table.add("a", Text("3.020").append("\n± 0.004", style="dim"))
    assert {"3.020", "±", "0.004"} <= whole(printed(table, 60))


def test_square_brackets_are_no_markup() -> None:
    table = ScreenTable([Column("label", words=True)], title="[red]t", below=["[bold]b"])
    table.add("[blue]c")
    assert {"[red]t", "[bold]b", "[blue]c"} <= whole(printed(table, 60))


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a row has 1 cells, one for each column; got 2"):
        ScreenTable([Column("a")]).add("1", "2")
