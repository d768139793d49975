"""A table: the same cells for the terminal, for Markdown and for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from sinkroute.lab import screen

__all__ = ["Cell", "Column", "Row", "Table", "mark_best", "plain"]


@dataclass(frozen=True)
class Column:
    """A column: its title, what it means, whether its lowest value is the best one, and how much it matters."""

    key: str
    title: str
    help: str
    lower_is_better: bool = False
    matters: int = 3


@dataclass(frozen=True)
class Cell:
    """A cell: what is printed, the number behind it (None for text and for nothing), and whether it is the best."""

    text: str
    value: float | None = None
    best: bool = False

    @property
    def main(self) -> str:
        """The text without what stands behind ± or in brackets."""
        return self.text.split(" ± ")[0].split(" (")[0]

    @property
    def detail(self) -> str:
        """What stands behind `main`: "± 0.004", "(load 0.9 to 1.2)" or nothing."""
        return self.text[len(self.main) :].strip()


@dataclass(frozen=True)
class Row:
    """A row; `kind` is "method" or "baseline", `tags` say what is special about it (failed, interrupted, diverged)."""

    label: str
    kind: str
    cells: tuple[Cell, ...]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table; `notes` say how to read it. A rich console prints it, and leaves out columns where it is narrow."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def cell(self, label: str, key: str) -> Cell:
        """The cell of a row and a column, by label and column key.

        Raises:
            KeyError: there is no such row or column; the message lists those there are.
        """
        keys = [column.key for column in self.columns]
        if key not in keys:
            raise KeyError(f"no column {key!r}; known: {', '.join(keys)}")
        for row in self.rows:
            if row.label == label:
                return row.cells[keys.index(key)]
        raise KeyError(f"no row {label!r}; known: {', '.join(row.label for row in self.rows)}")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [screen.Column(column.title, column.matters) for column in self.columns]
        out = screen.ScreenTable(
            [screen.Column("method", words=True), *columns], below=self.notes, elsewhere="the page"
        )
        for row in self.rows:
            label = Text(row.label, style="italic" if row.kind == "baseline" else "")
            for tag in row.tags:
                label.append(f"\n{tag}", style="yellow")
            out.add(label, *map(_printed, row.cells))
        yield out

    def markdown(self, title: str = "") -> list[str]:
        """Lines to paste into a document."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(map(plain, cells)) + " |"

        rows = [line([", ".join([row.label, *row.tags]), *(cell.text for cell in row.cells)]) for row in self.rows]
        head = line(["method", *(column.title for column in self.columns)])
        above = [f"**{plain(title)}**", ""] if title else []
        return [*above, head, "|---" * (len(self.columns) + 1) + "|", *rows, ""]


def mark_best(columns: Sequence[Column], rows: Sequence[Row]) -> list[Row]:
    """Mark the lowest value of each column; values that print alike are best together, and if all do, none is."""
    best: set[tuple[int, int]] = set()
    for c, column in enumerate(columns):
        values = {r: value for r, row in enumerate(rows) if (value := row.cells[c].value) is not None}
        if not column.lower_is_better or len(values) < 2:
            continue
        lowest = rows[min(values, key=lambda r: values[r])].cells[c].main
        winners = [r for r in values if rows[r].cells[c].main == lowest]
        if len(winners) < len(values):
            best |= {(r, c) for r in winners}
    return [
        replace(row, cells=tuple(replace(cell, best=cell.best or (r, c) in best) for c, cell in enumerate(row.cells)))
        for r, row in enumerate(rows)
    ]


def _printed(cell: Cell) -> Text:
    text = Text(cell.main, style="bold green" if cell.best else "")
    if cell.detail:
        text.append(f"\n{cell.detail}", style="not bold dim")
    return text


def plain(text: str) -> str:
    """Text that Markdown does not read as anything else.

    >>> plain("a|b")
    'a\\\\|b'
    """
    return "".join(f"\\{letter}" if letter in "|`*_<[]\\" else letter for letter in text.replace("\n", " "))
