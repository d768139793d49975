"""How far a comparison is: a bar for it all and one for each run; in a log file a line for each run that ends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

from sinkroute.lab.progress import Bars, in_new_tenth
from sinkroute.lab.study.cells import Cell
from sinkroute.lab.words import duration

__all__ = ["CompareDisplay"]


class CompareDisplay(Bars):
    """Told of every event of the pool by `listen`.

    Args:
        console: where it is drawn.
        cells: what this call is to run.
        at: the step at which each stands, by name; the pace is counted from there.
        lines: without a terminal, a line at each tenth of a run too.
    """

    def __init__(self, console: Console, cells: Sequence[Cell], at: Mapping[str, int], lines: bool = False) -> None:
        super().__init__(
            console,
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            refresh_per_second=2,
        )
        self.lines, self.total, self.done, self.failed = lines, len(cells), 0, 0
        self.at = dict(at)
        self.steps_left = sum(cell.config.train.steps - at[cell.name] for cell in cells)
        self.started, self.steps_done = 0.0, 0
        self.all = self.bars.add_task("runs", total=len(cells), note="")
        self.tasks: dict[str, TaskID] = {}

    def listen(self, cell: Cell, event: dict[str, Any]) -> None:
        """One event of one cell."""
        kind, name = event["kind"], cell.name
        if kind == "begin":
            self.started = self.started or time.monotonic()
            steps = cell.config.train.steps
            self.tasks[name] = self.bars.add_task(_shown(name), total=steps, completed=self.at[name], note="starting")
            return
        if kind == "progress":
            self.steps_done += event["step"] - self.at[name]
            new = in_new_tenth(event["step"], self.at[name], cell.config.train.steps)
            self.at[name] = event["step"]
            note = f"loss {event['loss']:.3f}  MaxVio {event['max_vio']:.2f}"
            self._update(name, completed=event["step"], note=note)
            self.bars.update(self.all, note=self._left())
            if self.lines and new and not self.console.is_terminal:
                self.say(f"{name} step {event['step']}/{cell.config.train.steps}  {note}  {self._left()}".rstrip())
            return
        if kind == "status":
            self._update(name, note=event["note"])
            return
        if name in self.tasks:
            self.bars.remove_task(self.tasks.pop(name))
        self.done += kind == "done"
        self.failed += kind == "failed"
        self.bars.update(self.all, completed=self.done, note=self._left())
        said = f"{self.done + self.failed}/{self.total} {name}: {kind}"
        if kind == "interrupted":
            said += f" at step {self.at[name]}"
        elif event.get("note"):
            said += f": {event['note']}"
        said += f" ({self._left()})" if kind == "done" and self._left() else ""
        self.say(said, style="red" if kind == "failed" else "")

    def _update(self, name: str, **fields: Any) -> None:
        if name in self.tasks:
            self.bars.update(self.tasks[name], **fields)

    def _left(self) -> str:
        """From the pace of all workers together."""
        parts = [f"{self.failed} failed"] if self.failed else []
        if self.steps_done:
            seconds = (time.monotonic() - self.started) / self.steps_done * max(self.steps_left - self.steps_done, 0)
            parts.append(f"about {duration(seconds)} left")
        return ", ".join(parts)


def _shown(name: str, width: int = 36) -> str:
    return name if len(name) <= width else f"{name[: width - 13]}…{name[-12:]}"
