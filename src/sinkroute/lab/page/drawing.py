"""What the figures of all pages share: matplotlib draws, and the SVG is rewritten so that it belongs to its page.

Figures for a page are drawn with stand-in colours (`#000001` is the ink, `#000010` the first method, ...), which
`inline` turns into CSS variables: the same SVG is then right on light paper and on a dark screen.

Nothing here touches pyplot or leaves a changed rcParam behind.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sinkroute.lab.page.palette import Ink

__all__ = ["WIDTH", "Theme", "heading", "inline", "page_theme", "paper_theme", "settings", "short", "style"]

WIDTH = 10.6
"""Of a figure in inches; 763 units of the SVG's view box."""


@dataclass(frozen=True)
class Theme:
    """The colours that a figure is drawn with; `words` are those of methods where they are written."""

    ink: str
    muted: str
    grid: str
    methods: tuple[str, ...]
    words: tuple[str, ...]


def page_theme(n: int) -> Theme:
    """The stand-ins of a page with n methods."""
    stands = tuple(f"#0000{16 + i:02x}" for i in range(n))
    return Theme("#000001", "#000002", "#000003", stands, stands)


def paper_theme(inks: Sequence[Ink]) -> Theme:
    """For a picture that stands by itself."""
    both = tuple(ink.light for ink in inks), tuple(ink.light_text for ink in inks)
    return Theme("#23262b", "#6a707a", "#e4e4e0", *both)


_VARIABLES = {"#000001": "var(--ink)", "#000002": "var(--muted)", "#000003": "var(--grid)"}


def settings(fonttype: str) -> AbstractContextManager[None]:
    """Within it everything is drawn; `fonttype` "none" leaves text as text, "path" draws its letters."""
    return mpl.rc_context(
        {
            "svg.fonttype": fonttype,
            "svg.hashsalt": "sinkroute",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 9.5,
            "text.parse_math": False,  # labels come from configurations: a dollar sign is a dollar sign
            "axes.unicode_minus": True,
            "axes.titlesize": 10,
            "path.simplify": True,
        }
    )


def short(label: str, width: int = 24) -> str:
    """A label in one line of at most `width` letters."""
    # Control characters would make the SVG ill-formed.
    flat = "".join(letter for letter in " ".join(label.split()) if letter.isprintable())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def style(ax: Axes, theme: Theme, *, grid: Literal["x", "y", "both", ""] = "y") -> None:
    """Axes without a frame, with a faint grid."""
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(theme.grid)
    ax.set_facecolor("none")
    ax.tick_params(length=0, colors=theme.muted, labelsize=9, pad=5)
    if grid:
        ax.grid(axis=grid, color=theme.grid, linewidth=0.7)
        ax.set_axisbelow(True)
    ax.xaxis.label.set_color(theme.muted)
    ax.yaxis.label.set_color(theme.muted)


def heading(ax: Axes, theme: Theme, text: str, note: str = "", lift: float = 11) -> None:
    """A left-aligned title in ink with a muted note behind it, which says the axis' unit."""
    title = ax.annotate(
        text, (0, 1), (0, lift), xycoords="axes fraction", textcoords="offset points",
        color=theme.ink, fontsize=10.5, fontweight="bold",
    )  # fmt: skip
    if note:
        ax.annotate(
            note, (1, 0), (7, 0), xycoords=title, textcoords="offset points",
            color=theme.muted, fontsize=9, va="bottom",
        )  # fmt: skip


_URL = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile(r"#0000[0-9a-f]{2}\b")
_FONT = re.compile(r"'DejaVu Sans'(, sans-serif)?|DejaVu Sans")


def inline(fig: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element for an HTML page.

    What matplotlib writes for a whole file is taken out (prologue, metadata, name spaces, a style sheet that would
    reach into the page), ids get the figure's name as a prefix, group ids of the form "m m3" become classes, and
    stand-in colours become CSS variables: `--m3` is the colour of method 3, `--t3` the same for words.
    """
    FigureCanvasSVG(fig)
    raw = io.BytesIO()
    fig.savefig(raw, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ET.fromstring(raw.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    used: set[str] = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            used.update(_URL.findall(value))
            if key.endswith("href"):
                used.add(value.removeprefix("#"))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {}
        for key, value in element.attrib.items():
            key = key.rpartition("}")[2]  # in HTML, href needs no xlink
            if key == "id" and value.startswith("m m"):
                attributes["class"] = value
            elif key == "id":
                if value in used:  # a marker may be defined twice; the first definition serves
                    used.remove(value)
                    attributes["id"] = f"{name}-{value}"
            elif key == "href" and value.startswith("#"):
                attributes["href"] = f"#{name}-{value[1:]}"
            else:
                value = _URL.sub(rf"url(#{name}-\1)", value)
                value = _COLOUR.sub(_word if element.tag == "text" else _shape, value)
                attributes[key] = _FONT.sub("var(--sans)", value)
        element.attrib.clear()
        element.attrib.update(attributes)
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = element.tail.strip() if element.tail else None
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title, "class": "plot"}
    return ET.tostring(root, encoding="unicode")


def _shape(stand: re.Match[str], kind: str = "m") -> str:
    return _VARIABLES.get(stand.group()) or f"var(--{kind}{int(stand.group()[1:], 16) - 16})"


def _word(stand: re.Match[str]) -> str:
    return _shape(stand, "t")
