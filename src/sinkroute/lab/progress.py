"""Progress in the terminal: bars for a person, plain lines for a log file. A study has its own, of many runs."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sinkroute.lab import training

__all__ = ["Bar", "Display"]


class Display:
    """A bar of a run with loss, tokens/s, MaxVio and the time left; without a terminal a line at each tenth of it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description:<14}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.label, self.steps = "", 0
        self.task: TaskID | None = None
        self.tenths = 0

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def begin(self, label: str, steps: int) -> None:
        """A new run."""
        self.label, self.steps, self.tenths = label, steps, 0
        self.task = self.bars.add_task(label, total=steps, note="starting")

    def update(self, progress: training.Progress) -> None:
        """A new line of its log."""
        speed = f"{progress.tokens_per_second / 1e3:5.1f}k tokens/s"
        note = f"loss {progress.loss:.3f}  {speed}  MaxVio {progress.max_vio:.2f}"
        if self.task is not None:
            self.bars.update(self.task, completed=progress.step, note=note)
        tenths = 10 * progress.step // progress.steps
        if not self.console.is_terminal and tenths > self.tenths:
            self.tenths = tenths
            words = f"{self.label:<14} step {progress.step}/{progress.steps}  {note}"
            self.console.print(words, highlight=False, markup=False)

    def status(self, text: str) -> None:
        """Passing words beside the bar of the current run."""
        if self.task is not None:
            self.bars.update(self.task, note=text)

    def note(self, text: str, done: bool = False) -> None:
        """Words beside the bar of the current run; `done` fills the bar."""
        if self.task is not None:
            self.bars.update(self.task, note=text, completed=self.steps if done else None)
        if not self.console.is_terminal:
            self.console.print(f"{self.label:<14} {text}", highlight=False, markup=False)


class Bar:
    """Drawn only when there is news: a thread that draws would take time from what is being timed."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self.bars = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self.task = self.bars.add_task("", total=total)

    def __enter__(self) -> Bar:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def tell(self, name: str, text: str) -> None:
        self.bars.update(self.task, description=f"{name}: {text}", refresh=True)

    def advance(self, name: str) -> None:
        self.done += 1
        self.bars.update(self.task, completed=self.done, refresh=True)
        if not self.console.is_terminal:
            self.console.print(f"{self.done}/{self.total} {name}", highlight=False)
