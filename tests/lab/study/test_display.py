"""What is printed while a comparison runs."""

from __future__ import annotations

import io
from collections.abc import Callable

from rich.console import Console

from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.display import CompareDisplay


def test_without_a_terminal_each_end_is_a_line_with_the_time_that_is_left(plan: Callable[..., Plan]) -> None:
    cells = plan(methods={"[red]a": {}, "b": {}, "c": {}}, seeds=[0]).cells
    out = io.StringIO()
    with CompareDisplay(
        Console(file=out, width=60), cells, {cells[0].name: 2, cells[1].name: 0, cells[2].name: 0}
    ) as shown:
        shown.listen(cells[0], {"kind": "begin"})
        shown.started -= 10
        shown.listen(cells[0], {"kind": "progress", "step": 4, "loss": 1.0, "max_vio": 0.5})
        shown.listen(cells[0], {"kind": "done"})
        shown.listen(cells[1], {"kind": "begin"})
        shown.listen(cells[1], {"kind": "failed", "note": "Diverged: [b]no[/b]"})
        shown.listen(cells[2], {"kind": "busy", "note": "left to process 3 on x"})
    first, second, third = out.getvalue().splitlines()
    # 2 steps in 10 s; of 2 + 4 + 4 steps 8 are left.
    assert first == "1/3 red_a-seed0: done (about 40 s left)"
    assert second == "2/3 b-seed0: failed: Diverged: [b]no[/b]"
    assert third == "2/3 c-seed0: busy: left to process 3 on x"


def test_a_terminal_has_a_bar_for_each_run(plan: Callable[..., Plan]) -> None:
    cells = plan(methods={"a": {}}, seeds=[0]).cells
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with CompareDisplay(console, cells, {cells[0].name: 0}) as shown:
        shown.listen(cells[0], {"kind": "begin"})
        shown.listen(cells[0], {"kind": "progress", "step": 2, "loss": 1.25, "max_vio": 0.5})
        shown.listen(cells[0], {"kind": "status", "note": "evaluating [x]"})
        shown.bars.refresh()
    assert "a-seed0" in out.getvalue()
    assert "evaluating [x]" in out.getvalue()
