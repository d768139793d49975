"""One colour and one marker per method, the same in every figure, the table and the key.

The hues are those of Okabe and Ito's palette for colour-blind readers (jfly.uni-koeln.de/color), with a slightly darker
variant for light paper and a slightly lighter one for dark screens. Warm colours are the selective methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["OVER", "UNDER", "Ink", "contrast", "inks"]

UNDER, OVER = "#2f80c8", "#d9580a"
"""Experts with less and with more than a fair share."""


@dataclass(frozen=True)
class Ink:
    """The colour of a method on light and on dark ground, and its marker (a matplotlib marker name)."""

    light: str
    dark: str
    marker: str

    @property
    def light_text(self) -> str:
        """The colour as that of words on light ground: darkened until it can be read (WCAG AA)."""
        return _legible(self.light, "#fbfaf7", "#000000")

    @property
    def dark_text(self) -> str:
        """The same on dark ground, lightened."""
        return _legible(self.dark, "#171b21", "#ffffff")


_KNOWN = {
    "softmax": Ink("#3b3f46", "#d3d7de", "o"),
    "load-balance": Ink("#0072b2", "#4aa8ec", "s"),
    "z-loss": Ink("#bf6598", "#e295c0", "D"),
    "sinkhorn": Ink("#008f68", "#2cc79b", "^"),
    "ssr-l": Ink("#d99200", "#f5b93d", "v"),
    "ssr-s": Ink("#d55e00", "#ff8138", "P"),
}
_SPARE = [
    Ink("#3a9bd0", "#7cc7f2", "X"),
    Ink("#7a5195", "#b694d6", "h"),
    Ink("#8a7a00", "#e6d84a", "p"),
    Ink("#7d4b2a", "#c99a78", "<"),
    Ink("#5c7f1f", "#a5cc5d", ">"),
    Ink("#a3324b", "#f0808f", "*"),
]


def inks(methods: Iterable[str]) -> list[Ink]:
    """One ink for each entry: the fixed one of a known method, else the next spare one.

    A method that occurs twice (the same router with other options) gets a spare ink the second time, so that two curves
    never share a colour until the spares run out.

    >>> [ink.light for ink in inks(["ssr-s", "mine", "ssr-s"])]
    ['#d55e00', '#3a9bd0', '#7a5195']
    """
    out: list[Ink] = []
    used: set[str] = set()
    spares = 0
    for method in methods:
        if method in _KNOWN and method not in used:
            out.append(_KNOWN[method])
            used.add(method)
        else:
            out.append(_SPARE[spares % len(_SPARE)])
            spares += 1
    return out


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two colours, 1 to 21.

    >>> round(contrast("#000000", "#ffffff"))
    21
    """
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _legible(colour: str, ground: str, towards: str, least: float = 4.6) -> str:
    for step in range(21):
        parts = zip(_rgb(colour), _rgb(towards), strict=True)
        mixed = "#" + "".join(f"{round(mine + (other - mine) * step / 20):02x}" for mine, other in parts)
        if contrast(mixed, ground) >= least:
            break
    return mixed


def _rgb(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def _luminance(colour: str) -> float:
    shares = [part / 255 for part in _rgb(colour)]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
