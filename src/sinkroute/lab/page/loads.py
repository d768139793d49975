"""One scale of colours for loads, in every heat map: clear is a fair share, whatever ground the page has.

Blue is less, and full where an expert gets nothing; orange is more, by the logarithm, and full at the largest load that
the figure shows, so that nothing saturates. `ticks` says what stands where on the scale.
"""

from __future__ import annotations

import math

import numpy as np

from sinkroute.lab.page.palette import OVER, UNDER

__all__ = ["LEAST_TOP", "colour", "rgba", "strength", "ticks"]

LEAST_TOP = 2.0
"""The scale reaches so far at least, or chance would look like collapse."""


def strength(relative: np.ndarray, top: float) -> np.ndarray:
    """Loads over a fair share → −1 for none, 0 for a fair share, 1 for `top`; what is not known is 0.

    >>> strength(np.array([0, 0.5, 1, 4, 16]), 16).tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    value = np.nan_to_num(np.asarray(relative, dtype=float), nan=1.0)
    more = np.log(np.clip(value, 1, top)) / math.log(top)
    return np.where(value < 1, value - 1, more)


def colour(relative: float, top: float) -> tuple[str, float]:
    """The colour of a load and its opacity.

    >>> colour(0.25, 8), colour(8, 8)
    (('#2f80c8', 0.75), ('#d9580a', 1.0))
    """
    off = float(strength(np.array(relative), top))
    return (UNDER if off < 0 else OVER), abs(off)


def rgba(relative: np.ndarray, top: float) -> np.ndarray:
    """Loads (...,) as pixels (..., 4), in 0 to 1."""
    off = strength(relative, top)
    under, over = (np.array([int(ink[place : place + 2], 16) / 255 for place in (1, 3, 5)]) for ink in (UNDER, OVER))
    return np.concatenate([np.where((off < 0)[..., None], under, over), np.abs(off)[..., None]], axis=-1)


def ticks(top: float) -> list[tuple[float, str]]:
    """Marks of the scale: where, from 0 to 1, and what.

    >>> ticks(6.5)[:3], ticks(6.5)[-2:]
    ([(0.0, '0'), (0.25, '½'), (0.5, 'fair share')], [(0.870..., '4'), (1.0, '6.5×')])
    """
    found = [(0.0, "0"), (0.25, "½"), (0.5, "fair share")]
    powers = [2.0**power for power in range(1, 20) if 2.0**power < top]
    every = math.ceil(len(powers) / 4) if powers else 1  # room for four between a fair share and the end
    shown = [power for power in powers[every - 1 :: every] if math.log(top / power) > 0.15 * math.log(top)]
    found += [(0.5 + 0.5 * math.log(power) / math.log(top), f"{power:g}") for power in shown]
    return [*found, (1.0, f"{top:.3g}×")]
