"""Numbers as text: a line a thing, a column a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["text_table"]


def text_table(head: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """The named columns of every row, three decimals of a float, a dash for None.

    >>> rows = {"0": {"tokens": 12, "cv": 0.5}, "last": {"tokens": 3, "cv": None}}
    >>> print(text_table("layer", ["tokens", "cv"], rows))
    layer  tokens     cv
    0          12  0.500
    last        3      -
    """
    lines = [[head, *columns], *([name, *(_shown(row[column]) for column in columns)] for name, row in rows.items())]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
