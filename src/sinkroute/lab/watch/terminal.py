"""Runs that are being trained, in a terminal: drawn anew each second, or into a pipe a line for each new line."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from sinkroute.lab.screen import Column, ScreenTable
from sinkroute.lab.watch.follow import DEAD, Followed, Follower, Point, fair_shares
from sinkroute.lab.words import duration

__all__ = ["COLUMNS", "bars", "line", "row", "screen", "sparkline", "watch"]

LEVELS = "▁▂▃▄▅▆▇█"
WIDTH = 36  # of a run's panel, without its frame
LAYERS = 6  # at most, of a panel
STATES = {"finished": "green", "running": "bold", "failed": "red", "diverged": "red", "silent": "yellow"}
COLUMNS = (
    Column("run", words=True),
    Column("state", matters=6, words=True),
    Column("step", matters=9),
    Column("loss", matters=8),
    Column("MaxVio", matters=7),
    Column("left", matters=5),
    Column("tokens/s", matters=4),
    Column("plans", matters=3),
    Column("dead", matters=2),
    Column("valid", matters=1),
)


def watch(follower: Follower, console: Console, *, once: bool = False, every: float = 1.0) -> None:
    """Show the runs until all have finished, or for ever where more may come.

    Args:
        follower: of the runs.
        console: a terminal, or what a pipe reads.
        once: show what there is, and return.
        every: seconds between two looks.
    """
    if once:
        follower.poll()
        console.print(screen(follower, console.width, height=10**6))
        return
    if not console.is_terminal:
        _lines(follower, console, every)
        return
    with Live(console=console, auto_refresh=False, screen=False, vertical_overflow="crop") as live:
        while True:
            follower.poll()
            live.update(screen(follower, console.width, console.height), refresh=True)
            if follower.over:
                return
            time.sleep(every)


def _lines(follower: Follower, console: Console, every: float) -> None:
    told: dict[Followed, str] = {}
    waited = False
    while True:
        for run, point in follower.poll():
            console.print(line(run, point), highlight=False, markup=False, soft_wrap=True)
        if follower.missing and not waited:
            waited = True
            missing = ", ".join(map(str, follower.missing))
            console.print(f"waiting for {missing}", highlight=False, markup=False, soft_wrap=True)
        for run in follower.runs.values():
            if run.state in ("finished", "failed", "diverged", "silent") and told.get(run) != run.state:
                console.print(f"{run.name}  {_ended(run)}", highlight=False, markup=False, soft_wrap=True)
            told[run] = run.state
        if follower.over:
            return
        time.sleep(every)


def line(run: Followed, point: Point) -> str:
    """A line of the log in words."""
    parts = [run.name, f"step {point.step}" + (f"/{run.steps}" if run.steps else "")]
    if point.loss is not None:
        parts.append(f"loss {point.loss:.4f}")
    if point.max_vio is not None and point.worst is not None:
        parts.append(f"MaxVio {point.max_vio:.2f} (worst layer {point.worst:.2f})")
    if point.tokens_per_second is not None:
        parts.append(f"{point.tokens_per_second:,.0f} tokens/s")
    if point.branches:
        parts.append(", ".join(f"{name} {calls:,.0f}" for name, calls in point.branches.items()))
    if point.dead:
        parts.append(f"{point.dead} dead")
    if point is run.last and (left := run.left) is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def screen(follower: Follower, width: int, height: int) -> RenderableType:
    """All runs as rows of a table, and below it as many of them in detail as fit, those that move first."""
    runs = sorted(follower.runs.values(), key=lambda run: run.state not in ("running", "silent"))
    below = [f"Nothing to follow yet at {path}: waiting." for path in follower.missing]
    below += [f"{count} more runs are planned in {path}." for path, count in follower.to_come.items() if count]
    shown = runs[: max(3, height - 6)]
    if len(shown) < len(runs):
        below.append(f"{len(runs) - len(shown)} more runs do not fit on this screen.")
    table = ScreenTable(COLUMNS, below=below)
    for run in follower.runs.values():
        if run in shown:
            table.add(*row(run))
    parts: list[RenderableType] = [table] if runs else [Text(text, style="dim") for text in below]
    panels = [_panel(run) for run in shown if run.load]
    across = max(1, width // (WIDTH + 5))
    tall = max((LAYERS + 6 for _ in panels), default=1)
    down = max(0, (height - len(shown) - len(below) - 4) // tall)
    if panels and down:
        parts.append(Columns(panels[: across * down], padding=(0, 1)))
    return Group(*parts)


def row(run: Followed) -> list[str | Text]:
    """The cells of a run, one for each of `COLUMNS`."""
    last, plans = run.last, run.planned
    loss = None if last is None else last.loss
    vio = None if last is None else last.max_vio
    speed = None if last is None else last.tokens_per_second
    measured = run.result or (run.evals[max(run.evals)] if run.evals else None)
    left = run.left
    return [
        run.name,
        Text(_state(run), STATES.get(run.state, "dim")),
        "" if last is None else f"{last.step:,}" + (f"/{run.steps:,}" if run.steps else ""),
        "" if loss is None else f"{loss:.4f}",
        "" if vio is None else f"{vio:.2f}",
        "" if left is None else duration(left),
        "" if speed is None else f"{speed:,.0f}",
        "" if plans is None else f"{plans:.1%}",
        f"{last.dead} of {sum(map(len, run.load.values()))}" if last is not None and run.load else "",
        f"{measured[1]:.4f} {measured[0].replace('_', ' ')}" if measured and math.isfinite(measured[1]) else "",
    ]


def _state(run: Followed) -> str:
    return f"silent for {duration(run.silence)}" if run.state == "silent" else run.state


def _ended(run: Followed) -> str:
    if run.state == "finished":
        name, value = run.result or ("", math.nan)
        return "finished" + (f": {name.replace('_', ' ')} {value:.4f}" if math.isfinite(value) else "")
    if run.state == "diverged":
        return f"diverged at step {run.last.step if run.last else 0}"
    return f"failed: {run.failure}" if run.state == "failed" else f"{_state(run)}; killed, or at something long"


def _panel(run: Followed) -> Panel:
    points = run.sorted
    rows: list[RenderableType] = []
    for name, values in (("loss", [point.loss for point in points]), ("MaxVio", [point.max_vio for point in points])):
        known = [value for value in values if value is not None and math.isfinite(value)]
        if known:
            rows.append(Text(f"{name} {known[0]:.3f} → {known[-1]:.3f}", "dim"))
            rows.append(Text(sparkline(known, WIDTH)))
    top = max(2.0, *(share for load in run.load.values() for share in fair_shares(load)))
    rows.append(Text(f"load of each expert; █ is {top:.1f} × a fair share", "dim"))
    layers = list(run.load.items())
    widest = max(len(name) for name, _ in layers[:LAYERS])
    named = min(widest, 12)
    for name, load in layers[:LAYERS]:
        rows.append(Text.assemble((f"{name[-named:]:>{named}} ", "dim"), bars(load, WIDTH - named - 1, top)))
    if len(layers) > LAYERS:
        rows.append(Text(f"and {len(layers) - LAYERS} more layers", "dim"))
    return Panel(Group(*rows), title=Text(run.name), width=WIDTH + 4)


def bars(load: Sequence[float], width: int, top: float) -> Text:
    """A bar for each expert, or for the busiest of several that stand beside each other where there are too many.

    Args:
        load: of each expert.
        width: columns of the terminal.
        top: load over a fair share of the tallest bar.

    >>> bars([4, 2, 2, 0], 10, top=2.0).plain
    '██▄▄▄▄··'
    >>> bars([0, 4, 2, 2], 2, top=2.0).plain
    '█▄'
    """
    shares, several = fair_shares(load), math.ceil(len(load) / width)
    wide = max(1, min(3, width // len(load)))
    text = Text()
    for at in range(0, len(shares), several):
        share = max(shares[at : at + several])
        level = LEVELS[min(len(LEVELS) - 1, max(0, math.ceil(share / top * len(LEVELS)) - 1))]
        style = "red" if share < DEAD else "dark_orange" if share > 1.5 else "blue" if share < 0.5 else ""
        text.append(("·" if share < DEAD else level) * wide, style)
    return text


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of means in so many columns at most, from the smallest value to the largest.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8)
    '▁▂▃▄▅▆▇█'
    >>> sparkline([1, 3, 5, 7], 2)
    '▁█'
    """
    count = min(width, len(values))
    means = []
    for place in range(count):
        part = values[place * len(values) // count : (place + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(LEVELS[round((value - low) / span * (len(LEVELS) - 1))] for value in means)
