"""The table, on a terminal and in Markdown."""

from __future__ import annotations

import io
from collections.abc import Callable

from rich.console import Console

from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.compare_table import all_tables, markdown, size_tables
from sinkroute.lab.study.results import gather
from sinkroute.lab.study.state import record_failure

from .conftest import SMALL, finish

Planner = Callable[..., Plan]


def test_a_row_has_n_mean_difference_p_and_verdict(plan: Planner) -> None:
    found = plan(seeds=[0, 1, 2], reference="vanilla")
    for cell in found.cells:
        finish(cell, found.out, 3.0 + 0.1 * cell.seed - (0.2 + 0.001 * cell.seed) * (cell.method == "ssr-l"))
    (each,) = size_tables(gather(found))
    # s = 0.1, t(0.975, 2) = 4.303: 0.248. The differences −0.200, −0.201, −0.202: s = 0.001, half 0.0025.
    assert each.table.cell("vanilla", "headline").text == "3.100 ± 0.248"
    assert each.table.cell("vanilla", "against").text == "reference"
    assert each.table.cell("ssr-l", "n").text == "3"
    assert each.table.cell("ssr-l", "against").text == "-0.201 ± 0.002"
    assert each.table.cell("ssr-l", "p").text == "< 0.001"
    assert each.table.cell("ssr-l", "verdict").text == "better"
    assert each.table.cell("ssr-l", "train.ms_per_step").text == "10.0 ± 0.0"


def test_one_seed_has_no_interval_and_no_verdict(plan: Planner) -> None:
    found = plan(seeds=[0], reference="vanilla")
    for cell in found.cells:
        finish(cell, found.out, 3.0)
    (each,) = size_tables(gather(found))
    row = [each.table.cell("ssr-l", key).text for key in ("headline", "against", "p", "verdict")]
    assert row == ["3.000", "+0.000", "–", "one seed"]


def test_a_method_without_runs_has_no_row_and_one_that_failed_has(plan: Planner) -> None:
    methods = {"vanilla": {}, "gone": {}, "not-begun": {}}
    found = plan(methods=methods, seeds=[0, 1], reference="vanilla")
    for cell in found.cells:
        if cell.method == "vanilla" and cell.seed == 0:
            finish(cell, found.out, 3.0)
        elif cell.method == "gone":
            record_failure(found.out / cell.name, cell.hash, "no")
    (each,) = size_tables(gather(found))
    assert [(row.label, row.tags) for row in each.table.rows] == [("vanilla", ()), ("gone", ("2 failed",))]
    assert each.table.cell("gone", "n").text == "0 of 2"
    assert each.table.cell("vanilla", "n").text == "1 of 2"


def test_markdown_is_a_table_that_labels_cannot_break(plan: Planner) -> None:
    found = plan(methods={"vanilla": {}, "a|b": {}}, seeds=[0, 1], reference="vanilla")
    for cell in found.cells:
        finish(cell, found.out, 3.0 + cell.seed)
    lines = markdown(gather(found)).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0].startswith("| method | n | valid bits/byte | against vanilla | p (Holm) | verdict |")
    assert table[3].startswith("| a\\|b | 2 | 3.500 ± 6.353 | +0.000 ± 0.000 | 1.000 | not distinguishable |")
    assert {line.replace("\\|", "").count("|") for line in table} == {table[0].count("|")}
    assert any(line.startswith("- ± is half") for line in lines)


def test_sizes_have_tables_with_their_parameters_and_a_trend(plan: Planner) -> None:
    sizes = {"s": {}, "t": {"model": {"d_model": 64}}}
    found = plan(sizes=sizes, seeds=[0, 1], reference="vanilla")
    for cell in found.cells:
        active = 1000 * (1 + (cell.size == "t"))
        finish(cell, found.out, 3.0 - 0.1 * (cell.method == "ssr-l"), parameters={"total": 3000, "active": active})
    titles = [title for title, _ in all_tables(gather(found))]
    assert titles[:2] == ["s: 3,000 parameters, 1,000 active", "t: 3,000 parameters, 2,000 active"]
    assert titles[2].startswith("Gain in valid bits/byte over vanilla")


def test_a_narrow_terminal_gets_stacked_columns_and_no_markup(plan: Planner) -> None:
    found = plan(methods={"vanilla": {}, "[red]x[/]": {}}, seeds=[0, 1], reference="vanilla")
    for cell in found.cells:
        finish(cell, found.out, 3.0)
    (each,) = size_tables(gather(found))
    out = io.StringIO()
    Console(file=out, width=60).print(each.table)
    assert out.getvalue().count("[red]x[/]") > 1
    assert max(map(len, out.getvalue().splitlines())) <= 60


def test_other_ways_of_serving_have_a_table(plan: Planner) -> None:
    found = plan(config={**SMALL, "eval": {"inference": ["both"], "attacks": {}}}, seeds=[0, 1])
    for cell in found.cells:
        mode = {"valid": {"bits_per_byte": 3.5}, "serving": {"max_vio": 2.0, "load": [[1]]}}
        finish(cell, found.out, 3.0 + 0.5 * cell.seed, inference={"both": mode})
    (title, table) = all_tables(gather(found))[1]
    assert title.startswith("Served otherwise")
    assert table.cell("ssr-l, both", "value").text == "3.500 ± 0.000"
    assert table.cell("ssr-l, both", "max_vio").text == "2.00 ± 0.00"
