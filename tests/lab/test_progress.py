"""Progress: bars for a person, lines for a log file."""

from __future__ import annotations

import io

from rich.console import Console

from sinkroute.lab.progress import Display
from sinkroute.lab.training import Progress


def shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=terminal, color_system=None)
    with Display(console) as display:
        display.begin("ssr-s", 40)
        for step in (2, 4, 6, 8, 40):
            display.update(Progress(step, 40, loss=2.5, tokens_per_second=12_345.0, max_vio=0.75))
        display.status("evaluating clean text: 50%")
        display.note("2.345 bits per byte", done=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_there_is_a_line_at_each_tenth() -> None:
    # The last line of all is empty with rich before 15.
    assert [line for line in shown(terminal=False).splitlines() if line] == [
        "ssr-s          step 4/40  loss 2.500   12.3k tokens/s  MaxVio 0.75",
        "ssr-s          step 8/40  loss 2.500   12.3k tokens/s  MaxVio 0.75",
        "ssr-s          step 40/40  loss 2.500   12.3k tokens/s  MaxVio 0.75",
        "ssr-s          2.345 bits per byte",
    ]


def test_a_terminal_shows_a_bar_with_the_last_words_and_the_time_left() -> None:
    text = shown(terminal=True)
    assert "40/40" in text
    assert "2.345 bits per byte" in text
    assert "left" in text
