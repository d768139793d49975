from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sinkroute.lab.study import Table, read_runs, result_table
from sinkroute.lab.study.table import Spread

MakeRun = Callable[..., Path]


def printed(table: object, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def best(table: Table, key: str) -> set[str]:
    return {row.label for row in table.rows if table.cell(row.label, key).best}


def test_the_numbers_of_a_row_are_those_of_the_result(demo: Path) -> None:
    table = result_table(read_runs(demo))
    texts = {column.key: table.cell("SSR-S", column.key).text for column in table.columns}
    assert texts == {
        "valid": "3.020",
        "perplexity": f"{2**3.02:.2f}",
        "word-swap": "3.270",
        "max_vio_train": "0.50",
        "max_vio_serving": "0.62",  # 0.625, printed half to even
        "dead": "0/8",
        "sinkhorn_steps": "4 (p=0.1)",
        "ms_per_step": "108.0",
        "peak_memory": "900",
    }
    assert table.cell("Vanilla", "dead").text == "2/8"
    assert table.cell("Vanilla", "sinkhorn_steps").text == "0"


def test_baselines_are_rows_with_bits_per_byte_only(demo: Path) -> None:
    table = result_table(read_runs(demo))
    assert [row.label for row in table.rows][-2:] == ["bigram", "trigram"]
    assert [cell.value for cell in table.rows[-1].cells] == [3.1] + [None] * 8


def test_the_lowest_value_of_each_column_is_best_and_equal_values_share_it(demo: Path) -> None:
    table = result_table(read_runs(demo))
    assert best(table, "valid") == best(table, "word-swap") == {"SSR-S"}
    assert best(table, "max_vio_serving") == {"Load-balance"}
    assert best(table, "dead") == {"Load-balance", "SSR-L", "SSR-S"}
    assert best(table, "ms_per_step") == set()  # wall time of runs made one after another: no comparison
    assert best(table, "peak_memory") == set()  # all equal: nothing stands out
    assert best(table, "sinkhorn_steps") == set()  # neither few nor many is better


def test_times_that_were_measured_in_turn_are_compared_and_wall_times_are_not_shown_beside_them(demo: Path) -> None:
    times = {"baseline": "Vanilla", "milliseconds": 81.4, "ratios": {"Vanilla": [1.0, 1.0], "SSR-S": [1.02, 1.1, 1.04]}}
    table = result_table(read_runs(demo), {"step_times": times})
    assert "ms_per_step" not in [column.key for column in table.columns]
    assert table.cell("Vanilla", "ratio").text == "81 ms"
    assert table.cell("SSR-S", "ratio").text == "1.04×"
    assert table.cell("SSR-L", "ratio").text == "–"  # it was not measured


def test_one_seed_has_no_interval_and_says_that_differences_may_be_chance(demo: Path) -> None:
    table = result_table(read_runs(demo))
    assert "±" not in printed(table.rich())
    assert "1 seed: differences of this size may be chance." in table.notes


def test_two_seeds_show_half_the_range(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", seed=0, bits=3.0)
    make_run(tmp_path, "b", "softmax", "Vanilla", seed=1, bits=3.1)
    table = result_table(read_runs(tmp_path))
    assert table.cell("Vanilla", "valid").text == "3.050 ± 0.050"
    assert any("half the range of n = 2 seeds" in note for note in table.notes)


def test_three_seeds_show_half_the_t_interval(make_run: MakeRun, tmp_path: Path) -> None:
    for seed, bits in enumerate([3.0, 3.1, 3.2]):
        make_run(tmp_path, f"r{seed}", "softmax", "Vanilla", seed=seed, bits=bits)
    table = result_table(read_runs(tmp_path))
    # s = 0.1, t(0.975, 2) = 4.303: 4.303 · 0.1 / √3 = 0.248
    assert table.cell("Vanilla", "valid").text == "3.100 ± 0.248"
    assert any("95 % t-interval of the mean over n = 3 seeds" in note for note in table.notes)


def test_a_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="values is empty"):
        Spread.of([])


def test_the_headline_says_where_ssr_stands_when_it_wins(demo: Path) -> None:
    headline = " ".join(result_table(read_runs(demo)).headline)
    assert "SSR-S has the lowest validation bits per byte at this size: 3.020." in headline
    assert "SSR-S is 0.020 below Vanilla and 0.030 below Load-balance" in headline
    assert "SSR-L is 0.020 above Vanilla and 0.010 above Load-balance" in headline
    assert "does not win" not in headline
    assert "Every finished method is below the trigram model (3.100)." in headline


def test_the_headline_says_where_ssr_stands_when_it_loses(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", bits=3.0)
    make_run(tmp_path, "b", "ssr-s", "SSR-S", bits=3.2, probability=0.1)
    headline = result_table(read_runs(tmp_path), {"trigram": {"bits_per_byte": 3.1}}).headline
    assert headline[0] == "Vanilla has the lowest validation bits per byte at this size: 3.000."
    assert headline[1] == "SSR does not win at this size."
    assert "SSR-S is 0.200 above Vanilla." in headline
    assert "1 of 2 methods are below the trigram model (3.100)." in headline


def test_a_difference_that_does_not_print_is_no_difference(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", bits=3.0001)
    make_run(tmp_path, "b", "ssr-s", "SSR-S", bits=3.0002, probability=0.1)
    table = result_table(read_runs(tmp_path))
    assert table.headline[0] == "Vanilla and SSR-S share the lowest validation bits per byte at this size: 3.000."
    assert "SSR-S is level with Vanilla." in table.headline
    assert best(table, "valid") == set()


def test_methods_are_compared_by_the_differences_of_runs_that_share_a_seed(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / "near", f"a{seed}", "softmax", "Vanilla", seed=seed, bits=3.0 + 0.1 * seed)
        make_run(tmp_path / "near", f"b{seed}", "ssr-s", "SSR-S", seed=seed, bits=3.05 - 0.1 * seed)
        # Seeds vary by more than the methods differ, but every seed by the same: 0.05 ± 4.303 · 0.001 / √3.
        make_run(tmp_path / "far", f"a{seed}", "softmax", "Vanilla", seed=seed, bits=3.05 + 0.101 * seed)
        make_run(tmp_path / "far", f"b{seed}", "ssr-s", "SSR-S", seed=seed, bits=3.0 + 0.1 * seed)
    near, far = (" ".join(result_table(read_runs(tmp_path / name)).headline) for name in ("near", "far"))
    assert "Paired by seed SSR-S cannot be told from Vanilla (1 comparison" in near
    assert "Paired by seed SSR-S is below Vanilla by more than the 95 % interval of the difference (1 comparison" in far
    assert "0.051 (± 0.002 paired) below Vanilla" in far


def test_an_unfinished_run_is_tagged_and_has_no_numbers(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla")
    make_run(tmp_path, "b", "ssr-s", "SSR-S", finished=False, lines=2)
    table = result_table(read_runs(tmp_path))
    row = next(row for row in table.rows if row.label == "SSR-S")
    assert row.tags == ("interrupted at step 20 of 40",)
    assert all(cell.value is None for cell in row.cells)
    assert table.headline[0] == "Only Vanilla has finished, with 3.000 validation bits per byte."


def test_no_finished_run_is_said_so(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", finished=False)
    assert result_table(read_runs(tmp_path)).headline == ("No run has finished yet, so there is nothing to compare.",)


def test_a_diverged_method_shows_nan_and_is_never_best(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", bits=math.nan, loss=math.nan)
    make_run(tmp_path, "b", "ssr-s", "SSR-S", bits=3.0)
    make_run(tmp_path, "c", "sinkhorn", "Sinkhorn", bits=3.1)
    table = result_table(read_runs(tmp_path))
    assert table.cell("Vanilla", "valid").text == "nan"
    assert best(table, "valid") == {"SSR-S"}
    assert table.rows[0].tags == ("diverged: loss not finite at step 10",)


def test_runs_of_a_label_that_differ_in_more_than_the_seed_are_noted(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "ssr-s", "SSR-S", seed=0, options={"epsilon": 0.1})
    make_run(tmp_path, "b", "ssr-s", "SSR-S", seed=1, options={"epsilon": 0.2})
    notes = result_table(read_runs(tmp_path)).notes
    assert "The runs of SSR-S differ in more than their seed: router.options.epsilon." in notes


def test_the_terminal_table_prints_labels_as_they_are_and_marks_the_best_in_green(
    demo: Path, make_run: MakeRun
) -> None:
    make_run(demo, "odd", "mine", "[red]odd[/red]", bits=3.5)
    rich_table = result_table(read_runs(demo)).rich(title="demo")
    assert "[red]odd[/red]" in printed(rich_table)
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(rich_table)
    assert isinstance(console.file, io.StringIO)
    assert re.search(r"\x1b\[1;32m *3\.020", console.file.getvalue())


@pytest.mark.parametrize("width", range(50, 131, 5))
def test_the_table_itself_fits_a_terminal_by_stacking_its_columns_and_cuts_nothing_off(demo: Path, width: int) -> None:
    table = result_table(read_runs(demo))
    text = printed(table, width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    shown = Counter(text.split())
    words = [word for row in table.rows for cell in row.cells for word in cell.text.split() if word != "–"]
    words += [word for column in table.columns for word in column.title.split()]
    assert not Counter(words) - shown


def test_asking_for_an_unknown_cell_lists_the_known_ones(demo: Path) -> None:
    table = result_table(read_runs(demo))
    with pytest.raises(KeyError, match="no column 'loss'; known: valid"):
        table.cell("SSR-S", "loss")
    with pytest.raises(KeyError, match="no row 'SSR'; known: Vanilla"):
        table.cell("SSR", "valid")


def test_no_runs_are_an_error() -> None:
    with pytest.raises(ValueError, match="runs is empty"):
        result_table([])


def test_missing_numbers_are_dashes(make_run: MakeRun, tmp_path: Path) -> None:
    bare: dict[str, Any] = {"train": {}, "serving": {}, "attacked": {}}
    make_run(tmp_path, "a", "softmax", "Vanilla", result=bare)
    table = result_table(read_runs(tmp_path))
    assert [table.cell("Vanilla", key).text for key in ("word-swap", "max_vio_train", "dead", "ms_per_step")] == [
        "–"
    ] * 4
