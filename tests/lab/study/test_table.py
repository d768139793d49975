"""The table of a comparison: on a terminal, in Markdown, of a plan and of runs that somebody names."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.results import Results, compare_runs, gather
from sinkroute.lab.study.runs import read_runs
from sinkroute.lab.study.state import record_failure
from sinkroute.lab.study.table import Table
from sinkroute.lab.study.tables import all_tables, markdown, print_results, sentences, size_tables

from .conftest import SMALL, finish

MakeRun = Callable[..., Path]
Planner = Callable[..., Plan]


def printed(table: object, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def compared(*paths: Path, baselines: dict[str, Any] | None = None) -> Results:
    return compare_runs(read_runs(list(paths)), baselines=baselines)


def table_of(*paths: Path, baselines: dict[str, Any] | None = None) -> Table:
    ((_, table),) = size_tables(compared(*paths, baselines=baselines))
    return table


def best(table: Table, key: str) -> set[str]:
    return {row.label for row in table.rows if table.cell(row.label, key).best}


# -- runs that somebody names ------------------------------------------------------------------------------------


def test_the_numbers_of_a_row_are_those_of_the_result(demo: Path) -> None:
    table = table_of(demo)
    texts = {column.key: table.cell("SSR-S", column.key).text for column in table.columns}
    assert texts == {
        "headline": "3.020",
        "against": "-0.020",  # Vanilla has 3.040
        "attacked.word-swap.bits_per_byte": "3.270",
        "train.max_vio": "0.50",
        "serving.max_vio": "0.62",  # 0.625, printed half to even
        "serving.dead": "0 (of 8)",
        "sinkhorn_steps": "4 (p=0.1)",
        "train.ms_per_step": "108.0",
        "train.peak_memory_mb": "900",
    }
    assert table.cell("Vanilla", "serving.dead").text == "2 (of 8)"
    assert table.cell("Vanilla", "against").text == "reference"


def test_baselines_are_rows_with_bits_per_byte_only(demo: Path) -> None:
    table = table_of(demo)
    assert [row.label for row in table.rows][-2:] == ["bigram", "trigram"]
    assert [cell.value for cell in table.rows[-1].cells] == [3.1] + [None] * 8


def test_the_lowest_value_of_each_column_is_best_and_equal_values_share_it(demo: Path) -> None:
    table = table_of(demo)
    assert best(table, "headline") == best(table, "attacked.word-swap.bits_per_byte") == {"SSR-S"}
    assert best(table, "serving.max_vio") == {"Load-balance"}
    assert best(table, "serving.dead") == {"Load-balance", "SSR-L", "SSR-S"}
    assert best(table, "train.ms_per_step") == set()  # wall times of runs are not compared
    assert best(table, "train.peak_memory_mb") == set()  # all equal: nothing stands out
    assert best(table, "sinkhorn_steps") == set()  # neither few nor many is better


def test_times_that_were_measured_in_turn_are_compared_and_wall_times_are_not_shown_beside_them(demo: Path) -> None:
    times = {"baseline": "Vanilla", "milliseconds": 81.4, "ratios": {"Vanilla": [1.0, 1.0], "SSR-S": [1.02, 1.1, 1.04]}}
    table = table_of(demo, baselines={"step_times": times})
    assert "train.ms_per_step" not in [column.key for column in table.columns]
    assert table.cell("Vanilla", "ratio").text == "81 ms"
    assert table.cell("SSR-S", "ratio").text == "1.04×"
    assert table.cell("SSR-L", "ratio").text == "–"  # it was not measured


def test_a_wall_time_has_the_load_of_its_machine_beside_it(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", result={"machine": {"load_average": [0.5, 1.25], "cores": 2}})
    make_run(tmp_path, "b", "ssr-l", "SSR-L", ms=1.0, result={"machine": {"load_average": [3.0, 2.0], "cores": 2}})
    found = compared(tmp_path)
    ((_, table),) = size_tables(found)
    assert table.cell("Vanilla", "train.ms_per_step").text == "100.0 (load 0.5 to 1.2)"
    assert best(table, "train.ms_per_step") == set()
    told = "while the runs began and ended 0.5 to 3.0 processes wanted one of its 2 cores"
    assert any("are not compared" in note and told in note for note in found.notes)


def test_runs_that_differ_in_more_than_their_method_are_never_in_one_table(make_run: MakeRun, tmp_path: Path) -> None:
    """Once such a report said: "ssr-fold is 0.701 above softmax", and "all else is the same"."""
    make_run(tmp_path, "a", "softmax", "softmax", bits=2.5)
    make_run(tmp_path, "b", "ssr-fold", "ssr-fold", bits=3.2, config={"train": {"steps": 40, "lr": 0.1}})
    found = compared(tmp_path)
    titles = [title for title, _ in size_tables(found)]
    assert [title.split(":")[0] for title in titles] == ["lr=0.003", "lr=0.1"]
    assert all(entry.against is None for entry in found.entries.values())
    told = " ".join(sentences(found))
    assert "differ in more than router and seed" in told and "none is compared across them" in told
    assert "above" not in told and "ssr-fold +" not in told


def test_runs_on_texts_that_differ_under_one_name_stand_apart(make_run: MakeRun, tmp_path: Path) -> None:
    for name, digest in (("a", "1" * 64), ("b", "2" * 64)):
        folder = make_run(tmp_path, name, "softmax", name)
        (folder / "corpus.json").write_text(f'{{"name": "wikipedia", "sha256": "{digest}"}}')
    assert compared(tmp_path).sizes == ["sha256=111111111111", "sha256=222222222222"]


def test_one_label_with_two_sets_of_options_is_two_methods(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "ssr-s", "SSR-S", options={"reg": 0.1, "noise": 0})
    make_run(tmp_path, "b", "ssr-s", "SSR-S", options={"reg": 0.2, "noise": 0})
    assert compared(tmp_path).methods == ["SSR-S reg=0.1", "SSR-S reg=0.2"]


def test_a_seed_that_is_there_twice_counts_once_and_is_told(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", bits=3.0)
    make_run(tmp_path, "b", "softmax", "Vanilla", bits=3.5)
    found = compared(tmp_path)
    assert found.entries["", "Vanilla", "valid.bits_per_byte"].values == {0: 3.0}
    assert any("repeats seed 0 of Vanilla" in note for note in found.notes)


def test_one_seed_has_no_interval_and_says_that_differences_may_be_chance(demo: Path) -> None:
    found = compared(demo)
    assert "±" not in printed(size_tables(found)[0][1])
    assert "With one seed there is neither interval nor test: differences may be chance." in found.notes


def test_seeds_give_an_interval_and_tests_against_plain_softmax(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in range(3):
        # Seeds vary by more than the methods differ, but every seed by the same: −0.051 ± 4.303 · 0.001 / √3.
        make_run(tmp_path, f"a{seed}", "ssr-s", "SSR-S", seed=seed, bits=3.0 + 0.1 * seed)
        make_run(tmp_path, f"b{seed}", "softmax", "Vanilla", seed=seed, bits=3.05 + 0.101 * seed)
    found = compared(tmp_path)
    ((_, table),) = size_tables(found)
    # s = 0.1, t(0.975, 2) = 4.303: 4.303 · 0.1 / √3 = 0.248
    assert table.cell("SSR-S", "headline").text == "3.100 ± 0.248"
    assert table.cell("SSR-S", "against").text == "-0.051 ± 0.002"
    assert table.cell("SSR-S", "flip").text == "0.250"
    assert table.cell("SSR-S", "detectable").text == "0.003"  # 3.26 · 0.001
    assert table.cell("SSR-S", "verdict").text == "better"
    assert "Against Vanilla, paired by seed and corrected: better: SSR-S." in sentences(found)


def test_the_sentences_say_who_is_lowest_how_far_and_how_even(demo: Path) -> None:
    told = sentences(compared(demo))
    assert told[0] == "SSR-S has the lowest valid bits/byte: 3.020."
    assert told[1] == "Against Vanilla: Load-balance +0.010, SSR-L +0.020, SSR-S -0.020."
    assert told[2] == "Load-balance serves with the most even load (MaxVio 0.38)."
    assert told[3] == "Every finished method is below the trigram model (3.100)."


def test_a_difference_that_does_not_print_is_no_difference(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", bits=3.0001)
    make_run(tmp_path, "b", "ssr-s", "SSR-S", bits=3.0002, probability=0.1)
    found = compared(tmp_path)
    assert sentences(found)[0] == "Vanilla and SSR-S have the lowest valid bits/byte: 3.000."
    assert best(size_tables(found)[0][1], "headline") == set()


def test_an_unfinished_run_is_tagged_and_has_no_numbers(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla")
    make_run(tmp_path, "b", "ssr-s", "SSR-S", finished=False, lines=2)
    found = compared(tmp_path)
    row = next(row for row in size_tables(found)[0][1].rows if row.label == "SSR-S")
    assert row.tags == ("interrupted at step 20 of 40",)
    assert all(cell.value is None for cell in row.cells)
    assert sentences(found)[0] == "Only Vanilla has finished: valid bits/byte 3.000."


def test_no_finished_run_is_said_so(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", finished=False)
    assert sentences(compared(tmp_path)) == ["No run has finished yet, so there is nothing to compare."]


def test_a_diverged_method_has_no_number_is_tagged_and_never_best(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", bits=math.nan, loss=math.nan)
    make_run(tmp_path, "b", "ssr-s", "SSR-S", bits=3.0)
    make_run(tmp_path, "c", "sinkhorn", "Sinkhorn", bits=3.1)
    found = compared(tmp_path)
    ((_, table),) = size_tables(found)
    assert table.cell("Vanilla", "headline").text == "–"
    assert best(table, "headline") == {"SSR-S"}
    assert table.rows[0].tags == ("diverged: loss not finite at step 10",)
    assert "Vanilla: 1 of 1 runs have no finite valid bits/byte." in found.notes


def test_the_terminal_prints_labels_as_they_are_and_marks_the_best_in_green(demo: Path, make_run: MakeRun) -> None:
    make_run(demo, "odd", "mine", "[red]odd[/red]", bits=3.5)
    table = table_of(demo)
    assert "[red]odd[/red]" in printed(table)
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert re.search(r"\x1b\[1;32m *3\.020", console.file.getvalue())


@pytest.mark.parametrize("width", range(60, 131, 10))
def test_a_narrow_terminal_drops_columns_by_name_and_cuts_no_number(demo: Path, width: int) -> None:
    table = table_of(demo)
    text = printed(table, width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    above, _, below = text.partition(" left out for the width: ")
    dropped = " ".join(below.split())
    for place, column in enumerate(table.columns):
        if " ".join(column.title.split()) in dropped:
            continue
        for row in table.rows:
            assert all(word in above for word in row.cells[place].text.split()), (column.key, row.label)
    assert "3.020" in above and "-0.020" in above  # what matters most stays at 60 columns


def test_asking_for_an_unknown_cell_lists_the_known_ones(demo: Path) -> None:
    table = table_of(demo)
    with pytest.raises(KeyError, match="no column 'loss'; known: headline"):
        table.cell("SSR-S", "loss")
    with pytest.raises(KeyError, match="no row 'SSR'; known: Vanilla"):
        table.cell("SSR", "headline")


def test_no_runs_are_an_error() -> None:
    with pytest.raises(ValueError, match="runs is empty"):
        compare_runs([])


# -- a plan ------------------------------------------------------------------------------------------------------


def test_a_row_has_n_mean_difference_p_and_verdict(plan: Planner) -> None:
    found = plan(seeds=[0, 1, 2], reference="vanilla")
    for cell in found.cells:
        finish(cell, found.out, 3.0 + 0.1 * cell.seed - (0.2 + 0.001 * cell.seed) * (cell.method == "ssr-l"))
    ((_, table),) = size_tables(gather(found))
    # s = 0.1, t(0.975, 2) = 4.303: 0.248. The differences −0.200, −0.201, −0.202: s = 0.001, half 0.0025.
    assert table.cell("vanilla", "headline").text == "3.100 ± 0.248"
    assert table.cell("vanilla", "against").text == "reference"
    assert table.cell("ssr-l", "n").text == "3"
    assert table.cell("ssr-l", "against").text == "-0.201 ± 0.002"
    assert table.cell("ssr-l", "p").text == "< 0.001"
    assert table.cell("ssr-l", "verdict").text == "better"
    assert table.cell("ssr-l", "train.ms_per_step").text == "10.0 ± 0.0"


def test_a_study_that_names_a_margin_calls_methods_equivalent(plan: Planner) -> None:
    found = plan(seeds=[0, 1, 2, 3], reference="vanilla", equivalence=0.05)
    for cell in found.cells:
        finish(cell, found.out, 3.0 + 0.1 * cell.seed + 0.002 * (-1) ** cell.seed * (cell.method == "ssr-l"))
    results = gather(found)
    ((_, table),) = size_tables(results)
    assert table.cell("ssr-l", "verdict").text == "equivalent"
    assert table.cell("ssr-l", "equivalent").text == "< 0.001"
    assert any("within ±0.05" in note for note in results.notes)


def test_times_of_runs_get_no_verdict_even_where_they_come_first(plan: Planner) -> None:
    found = plan(seeds=[0, 1, 2], reference="vanilla", metrics=["train.ms_per_step"])
    for cell in found.cells:
        finish(cell, found.out, 3.0, train={"ms_per_step": 10.0 + cell.seed / 9 + (cell.method == "ssr-l")})
    ((_, table),) = size_tables(gather(found))
    assert table.cell("ssr-l", "verdict").text == "not compared"
    assert best(table, "headline") == best(table, "against") == set()
    assert not any("better" in each or "worse" in each for each in sentences(gather(found)))


def test_one_seed_has_no_interval_and_no_verdict(plan: Planner) -> None:
    found = plan(seeds=[0], reference="vanilla")
    for cell in found.cells:
        finish(cell, found.out, 3.0)
    ((_, table),) = size_tables(gather(found))
    assert [table.cell("ssr-l", key).text for key in ("headline", "against")] == ["3.000", "+0.000"]
    assert not {"n", "p", "flip", "detectable", "verdict"} & {column.key for column in table.columns}


def test_a_method_without_runs_has_no_row_and_one_that_failed_has(plan: Planner) -> None:
    methods = {"vanilla": {}, "gone": {}, "not-begun": {}}
    found = plan(methods=methods, seeds=[0, 1], reference="vanilla")
    for cell in found.cells:
        if cell.method == "vanilla" and cell.seed == 0:
            finish(cell, found.out, 3.0)
        elif cell.method == "gone":
            record_failure(found.out / cell.name, cell.hash, "no")
    ((_, table),) = size_tables(gather(found))
    assert [(row.label, row.tags) for row in table.rows] == [("vanilla", ()), ("gone", ("2 failed",))]
    assert table.cell("gone", "n").text == "0 of 2"
    assert table.cell("vanilla", "n").text == "1 of 2"


def test_markdown_is_a_table_that_labels_cannot_break(plan: Planner) -> None:
    found = plan(methods={"vanilla": {}, "a|b": {}}, seeds=[0, 1], reference="vanilla")
    for cell in found.cells:
        finish(cell, found.out, 3.0 + cell.seed)
    lines = markdown(gather(found)).splitlines()
    table = [line for line in lines if line.startswith("|")]
    head = (
        "| method | n | valid bits/byte | against vanilla | p (Holm) | p (sign flips) | detectable (80 %) | verdict |"
    )
    assert table[0].startswith(head)
    row = "| a\\|b | 2 | 3.500 ± 6.353 | +0.000 ± 0.000 | 1.000 | 1.000 | 0.000 | not distinguishable |"
    assert table[3].startswith(row)
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


def test_other_ways_of_serving_have_a_table(plan: Planner) -> None:
    found = plan(config={**SMALL, "eval": {"inference": ["both"], "attacks": {}}}, seeds=[0, 1])
    for cell in found.cells:
        mode = {"valid": {"bits_per_byte": 3.5}, "serving": {"max_vio": 2.0, "load": [[1]]}}
        finish(cell, found.out, 3.0 + 0.5 * cell.seed, inference={"both": mode})
    (title, table) = all_tables(gather(found))[1]
    assert title.startswith("Served otherwise")
    assert table.cell("ssr-l, both", "value").text == "3.500 ± 0.000"
    assert table.cell("ssr-l, both", "max_vio").text == "2.00 ± 0.00"


def test_what_is_printed_has_tables_words_and_notes(plan: Planner) -> None:
    found = plan(methods={"vanilla": {}, "[red]x[/]": {}}, seeds=[0, 1], reference="vanilla")
    for cell in found.cells:
        finish(cell, found.out, 3.0)
    console = Console(file=io.StringIO(), width=60)
    print_results(gather(found), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text.count("[red]x[/]") > 1
    assert "- ± is half of the 95 % t-interval" in text
