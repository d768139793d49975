"""A table for terminals of any width: no number in it is ever cut or broken.

Where not all columns fit, those that matter least are left out, and a line below the table names them and says how wide
a terminal would show them. Only columns of words may be folded. What is printed into a file or a pipe is 80 columns
wide unless the environment's COLUMNS says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

__all__ = ["Column", "ScreenTable", "left_out"]

_FOLDED, _NAME = 14, 32  # columns of the terminal that words keep when they are folded, and a name among them
_GAP = 2  # between two columns


@dataclass(frozen=True)
class Column:
    """A column of a `ScreenTable`.

    Attributes:
        title: may have several lines.
        matters: columns with less are left out first; among equals the one that stands further right.
        words: left-justified words, which may be folded; else numbers, or a drawing, which may not.
    """

    title: str
    matters: int = 0
    words: bool = False

    @property
    def name(self) -> str:
        """The title in one line."""
        return " ".join(self.title.split())


@dataclass
class ScreenTable:
    """Rows under columns, of which the first is always shown.

    Attributes:
        columns: titles and how much they matter.
        title: stands above.
        below: sentences that stand below, muted.
        elsewhere: where else columns are shown that are left out, such as "--json".

    >>> table = ScreenTable([Column("run", words=True), Column("loss"), Column("ms")], elsewhere="--json")
    >>> table.add("a", "0.25", "123456789")
    >>> Console(width=18, no_color=True).print(table)  # doctest: +NORMALIZE_WHITESPACE
    run  loss
    ─────────
    a    0.25
    1 column left out
    for the width: ms;
    a terminal 20 wide
    (COLUMNS=20) or
    --json shows all
    """

    columns: Sequence[Column]
    title: str = ""
    below: Sequence[str] = ()
    elsewhere: str = ""
    rows: list[tuple[tuple[Text, ...], bool]] = field(default_factory=list, init=False)

    def add(self, *cells: str | Text, end: bool = False) -> None:
        """A cell for each column; a string is no markup. `end`: a line is drawn below the row.

        Raises:
            ValueError: as many cells as there are columns are needed.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"a row has {len(self.columns)} cells, one for each column; got {len(cells)}")
        self.rows.append((tuple(Text(cell) if isinstance(cell, str) else cell for cell in cells), end))

    def shown(self, width: int) -> list[int]:
        """Which columns fit into so many columns of a terminal, numbers whole."""
        left = list(range(len(self.columns)))
        while len(left) > 1 and sum(self._least(place) + _GAP for place in left) - _GAP > width:
            left.remove(min(left[1:], key=lambda place: (self.columns[place].matters, -place)))
        return left

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self.shown(options.max_width)
        if self.title:
            yield Text(self.title, style="italic", overflow="fold")
        yield self._table(shown)
        out = [column.name for place, column in enumerate(self.columns) if place not in shown]
        if out:
            wide = sum(self._least(place) + _GAP for place in range(len(self.columns))) - _GAP
            yield Text(left_out(out, wide, self.elsewhere), style="yellow", overflow="fold")
        if self.below:
            yield Text("\n".join(self.below), style="dim", overflow="fold")

    def _least(self, place: int) -> int:
        """The width below which a column's numbers, or names of its words, would break."""
        texts = [self.columns[place].title, *(cells[place].plain for cells, _ in self.rows)]
        width = max(cell_len(line) for text in texts for line in text.split("\n"))
        if not self.columns[place].words:
            return width
        name = max((cell_len(word) for text in texts for word in text.split()), default=0)
        return min(width, max(_FOLDED, min(name, _NAME)))

    def _table(self, shown: Sequence[int]) -> Table:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for place in shown:
            column = self.columns[place]
            table.add_column(
                Text(column.title),
                justify="left" if column.words else "right",
                overflow="fold",
                no_wrap=not column.words,
                min_width=self._least(place),
            )
        for cells, end in self.rows:
            table.add_row(*(cells[place] for place in shown), end_section=end)
        return table


def left_out(columns: Sequence[str], wide: int, elsewhere: str = "") -> str:
    """The sentence that names columns for which there is no room; all have it in a terminal so wide.

    >>> left_out(["ms"], 20, "--json")
    '1 column left out for the width: ms; a terminal 20 wide (COLUMNS=20) or --json shows all'
    """
    also = f" or {elsewhere}" if elsewhere else ""
    return (
        f"{len(columns)} column{'s' * (len(columns) > 1)} left out for the width: {', '.join(columns)}; "
        f"a terminal {wide} wide (COLUMNS={wide}){also} shows all"
    )
