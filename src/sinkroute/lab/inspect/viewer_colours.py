"""A colour for every expert, light and dark, that text can stand on and that can be told from the others.

Candidates are hues at seven heights of lightness and four of chroma (OKLCH). Each next colour is the candidate that is
farthest from all before it, in the nearer of the two themes. So the first 8 are as far apart as 8 can be, the first
128 as 128 can, and an expert's colour depends on no other number than the expert's.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from sinkroute.lab.page.palette import contrast

__all__ = ["INK", "MOST", "Colour", "colours"]

INK = ("#1d2126", "#f2f4f6")
"""Of text on the colours, light and dark."""

MOST = 256
"""So many colours are told apart; expert 256 has the colour of expert 0."""

_LEVELS = tuple((0.69 + 0.24 * step / 6, 0.52 - 0.22 * step / 6) for step in range(7))  # on light, on dark
_CHROMA, _HUES, _PARTS = 0.22, 60, (1.0, 0.75, 0.5, 0.25)
_LEAST = 4.5  # contrast of text, WCAG AA

_Lab = tuple[float, float, float]


class Colour(NamedTuple):
    """`#rrggbb` of an expert's ground on a light and on a dark page."""

    light: str
    dark: str


def colours(number: int) -> list[Colour]:
    """The colours of experts 0 to `number` − 1.

    >>> colours(2)[0] == colours(128)[0], len(set(colours(128)))
    (True, 128)
    """
    found = _ordered(min(number, MOST))
    return [found[expert % MOST] for expert in range(number)]


@cache
def _ordered(number: int) -> list[Colour]:
    candidates = _candidates()
    apart = [math.inf] * len(candidates)
    place, out = 0, []
    for _ in range(number):
        lights, darks, colour = candidates[place]
        out.append(colour)
        for other, (light, dark, _) in enumerate(candidates):
            apart[other] = min(apart[other], math.dist(lights, light), math.dist(darks, dark))
        place = max(range(len(candidates)), key=apart.__getitem__)
    return out


@cache
def _candidates() -> list[tuple[_Lab, _Lab, Colour]]:
    out = []
    for light, dark in _LEVELS:
        for step in range(_HUES):
            hue = 2 * math.pi * ((step / _HUES + 0.69) % 1)  # the first is a blue
            for part in _PARTS:
                labs = [_within(lightness, hue, part) for lightness in (light, dark)]
                hexes = Colour(*map(_hex, labs))
                if all(contrast(ground, ink) >= _LEAST for ground, ink in zip(hexes, INK, strict=True)):
                    out.append((labs[0], labs[1], hexes))
    return out


def _within(lightness: float, hue: float, part: float) -> _Lab:
    """A part of the chroma that sRGB has at this lightness and hue."""
    chroma = _CHROMA
    while chroma > 0 and not all(
        -1e-4 <= value <= 1.0001 for value in _linear((lightness, chroma * math.cos(hue), chroma * math.sin(hue)))
    ):
        chroma -= 0.005
    return lightness, part * chroma * math.cos(hue), part * chroma * math.sin(hue)


def _linear(lab: _Lab) -> _Lab:
    """OKLab to linear sRGB (Ottosson, bottosson.github.io/posts/oklab)."""
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )


def _hex(lab: _Lab) -> str:
    curved = (
        12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
        for value in (min(max(value, 0.0), 1.0) for value in _linear(lab))
    )
    return "#" + "".join(f"{round(255 * value):02x}" for value in curved)
