"""Numbers as people say them: times, counts, shares. (Without torch.)"""

from __future__ import annotations

__all__ = ["count", "duration", "percent"]


def duration(seconds: float) -> str:
    """So long, in words.

    >>> [duration(seconds) for seconds in (4.2, 130, 7500, 200000)]
    ['4 s', '2 min', '2 h 05 min', '2 d 7 h']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def count(number: float) -> str:
    """In three digits.

    >>> count(1234567), count(999600), count(345678), count(12)
    ('1.23 M', '1 M', '346 k', '12')
    """
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # what rounds to it, too
            return f"{number / size:.3g} {name}"
    return f"{number:.0f}"


def percent(share: float) -> str:
    """A share, with the digits that it needs.

    >>> percent(0.1234), percent(0.00012), percent(0.0)
    ('12.3%', '0.01%', '0%')
    """
    return f"{100 * share:.{0 if round(share, 4) in (0, 0.1, 1) else 1 if abs(share) >= 0.0095 else 2}f}%"
