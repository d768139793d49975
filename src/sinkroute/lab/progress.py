"""Progress in the terminal: bars for a person, plain lines for a log file. A study has its own, of many runs."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import Self

if TYPE_CHECKING:
    from sinkroute.lab import training

__all__ = ["Bar", "Bars", "Display", "in_new_tenth"]


class Bars:
    """Bars that are drawn on a terminal, and nowhere else, while the context is open; lines go anywhere."""

    def __init__(self, console: Console, *columns: ProgressColumn, **options: Any) -> None:
        self.console = console
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal, **options)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def say(self, words: str, style: str = "") -> None:
        """A line beside the bars."""
        self.console.print(words, style=style, highlight=False, markup=False, soft_wrap=True)


def in_new_tenth(step: int, before: int, steps: int) -> bool:
    """Whether a tenth of the steps was completed since `before`, so that a log file gets a line.

    >>> in_new_tenth(10, 9, 100), in_new_tenth(19, 10, 100)
    (True, False)
    """
    return 10 * step // steps > 10 * before // steps


class Display(Bars):
    """A bar of a run with loss, tokens/s, MaxVio and the time left; without a terminal a line at each tenth of it."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            TextColumn("{task.description:<14}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.label, self.steps, self.at = "", 0, 0
        self.task: TaskID | None = None

    def begin(self, label: str, steps: int) -> None:
        """A new run."""
        self.label, self.steps, self.at = label, steps, 0
        self.task = self.bars.add_task(label, total=steps, note="starting")

    def update(self, progress: training.Progress) -> None:
        """A new line of its log."""
        speed = f"{progress.tokens_per_second / 1e3:5.1f}k tokens/s"
        note = f"loss {progress.loss:.3f}  {speed}  MaxVio {progress.max_vio:.2f}"
        if self.task is not None:
            self.bars.update(self.task, completed=progress.step, note=note)
        if not self.console.is_terminal and in_new_tenth(progress.step, self.at, progress.steps):
            self.say(f"{self.label:<14} step {progress.step}/{progress.steps}  {note}")
        self.at = progress.step

    def status(self, text: str) -> None:
        """Passing words beside the bar of the current run."""
        if self.task is not None:
            self.bars.update(self.task, note=text)

    def note(self, text: str, done: bool = False) -> None:
        """Words beside the bar of the current run; `done` fills the bar."""
        if self.task is not None:
            self.bars.update(self.task, note=text, completed=self.steps if done else None)
        if not self.console.is_terminal:
            self.say(f"{self.label:<14} {text}")


class Bar(Bars):
    """Drawn only when there is news: a thread that draws would take time from what is being timed."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(
            console,
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            auto_refresh=False,
        )
        self.total, self.done = total, 0
        self.task = self.bars.add_task("", total=total)

    def tell(self, name: str, text: str) -> None:
        self.bars.update(self.task, description=f"{name}: {text}", refresh=True)

    def advance(self, name: str) -> None:
        self.done += 1
        self.bars.update(self.task, completed=self.done, refresh=True)
        if not self.console.is_terminal:
            self.say(f"{self.done}/{self.total} {name}")
