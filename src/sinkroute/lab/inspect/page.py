"""An inspection as one self-contained HTML page.

Nothing is fetched. Names of models, files and modules pass through jinja2's autoescape; only the SVG of `page.heat`,
which escapes its own texts, does not.
"""

from __future__ import annotations

from pathlib import Path

from sinkroute.lab.files import write_text
from sinkroute.lab.inspect.advice import advice, recipe
from sinkroute.lab.inspect.result import NEAR_DEAD, Audit
from sinkroute.lab.inspect.table import ALTERNATIVES, cells, facts, labels, summary
from sinkroute.lab.machine import machine
from sinkroute.lab.page import render
from sinkroute.lab.page.heat import bars_svg, heat_svg
from sinkroute.lab.words import percent
from sinkroute.routing.metrics import DEAD
from sinkroute.routing.registry import RECOMMENDED

__all__ = ["write_page"]


def write_page(audit: Audit, path: Path, *, viewer: str | None = None) -> None:
    """Write the page; its folder is there.

    Args:
        audit: what it shows.
        path: of the HTML file.
        viewer: the name of the token viewer beside it (`write_viewer`), which it links.

    Raises:
        ModuleNotFoundError: jinja2 is missing; `pip install "sinkroute[inspect]"` brings it.
    """
    from markupsafe import Markup

    names, on = labels(audit.layers), machine()
    loads = [
        (name, layer.relative()) for name, layer in zip(names, audit.layers, strict=True) if layer.load is not None
    ]
    rules: dict[str, list[str]] = {}
    for layer in audit.layers:
        rules.setdefault(f"{layer.router}: {layer.rule or 'not understood'}", []).append(layer.path)
    page = render(
        "inspect/page.html.j2",
        audit=audit,
        sentences=summary(audit),
        advice=advice(audit),
        recipe=recipe(audit),
        facts=facts(audit),
        machine=f"{on['gpu'] or on['cpu']}, torch {on['torch']}, sinkroute {on['sinkroute']}",
        heatmap=Markup(heat_svg(loads, "Load of every expert, by layer")),
        rows=[
            {
                "label": label,
                "layer": layer,
                "cells": None if layer.load is None else cells(layer),
                "bars": Markup(bars_svg(layer.relative())),
            }
            for label, layer in zip(names, audit.layers, strict=True)
        ],
        alternatives=ALTERNATIVES,
        rules=rules,
        near_dead=percent(NEAR_DEAD),
        dead=f"{DEAD:.0%}",
        recommended=RECOMMENDED,
        viewer=viewer,
    )
    write_text(page, path)
