"""Progress: a bar for a person, a line a problem for a log file."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Bar"]


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
