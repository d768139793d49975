"""A comparison as one self-contained HTML page.

Nothing is fetched. All words, names of methods and errors among them, pass through jinja2's autoescape; only the SVG of
`figures`, which matplotlib escapes, does not.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from sinkroute.lab.config import to_mapping
from sinkroute.lab.files import write_text
from sinkroute.lab.page import render
from sinkroute.lab.page.palette import inks
from sinkroute.lab.study.compare_table import all_tables
from sinkroute.lab.study.results import Results

__all__ = ["write_page"]

_FORESTS = 4  # metrics beside the headline that get a separate figure of differences


def write_page(found: Results, path: Path) -> Path:
    """Write the page; its folder is there.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is missing; `pip install "sinkroute[lab]"` brings both.
    """
    from markupsafe import Markup

    from sinkroute.lab.study import figures

    plan = found.plan
    assert plan is not None
    routers = {cell.method: cell.config.router.name for cell in plan.cells}
    colours = inks(routers[method] for method in plan.methods)
    shown = found.metrics[: 1 + _FORESTS]
    forests: dict[str, list[tuple[str, Markup]]] = {}
    for place, metric in enumerate(shown):
        for number, size in enumerate(plan.sizes):
            if svg := figures.forest_figure(found, size, metric, colours, f"forest-{number}-{place}"):
                forests.setdefault(metric.title, []).append((size, Markup(svg)))
    pair = [found.headline, *(metric for metric in found.metrics[1:] if metric.key == "train.max_vio")]
    lines = [
        (size, grid, Markup(figures.grid_figure(found, grid, size, pair, f"grid-{number}-{which}")))
        for number, size in enumerate(plan.sizes)
        for which, grid in enumerate(figures.grids(found))
        if any(found.counts(size, method)[0] for line in grid.lines.values() for _, method in line)
    ]
    first = {method: next(cell for cell in plan.cells if cell.method == method) for method in plan.methods}
    page = render(
        "study/compare_page.html.j2",
        found=found,
        plan=plan,
        inks=colours,
        tables=all_tables(found),
        place={method: number for number, method in enumerate(plan.methods)},
        forests=forests,
        headline=found.headline.title,
        grids=lines,
        sizes=Markup(figures.size_figure(found, colours)),
        facts=_facts(found),
        provenance=_provenance(found),
        configurations={
            method: yaml.safe_dump(to_mapping(cell.config), sort_keys=False, allow_unicode=True, width=100)
            for method, cell in first.items()
        },
    )
    write_text(page, path)
    return path


def _facts(found: Results) -> list[tuple[str, str]]:
    """(number, what it counts)."""
    plan = found.plan
    done = sum(run.finished for run in found.runs)
    facts = [
        (str(len(plan.methods)), "methods"),
        (str(len({cell.seed for cell in plan.cells})), "seeds"),
        (f"{done} of {len(plan.cells)}", "runs are done"),
        (_hours(found.seconds), "of processes' time in all"),
    ]
    return facts if len(plan.sizes) == 1 else [facts[0], (str(len(plan.sizes)), "sizes"), *facts[1:]]


def _provenance(found: Results) -> list[tuple[str, str]]:
    done = [run.record for run in found.runs if run.finished]
    machines = sorted({f"{record.get('gpu') or record.get('cpu')}, {record.get('cores')} cores" for record in done})
    versions = sorted({f"sinkroute {each['sinkroute']} ({each['commit']}), torch {each['torch']}" for each in done})
    settings = [cell.config.data for cell in found.plan.cells]
    data = sorted({f"{one.name}, then {one.switch_to}" if one.switch_to else one.name for one in settings})
    told = [("Data", data), ("Machine", machines), ("Code", versions), ("Configuration", [found.plan.path.name])]
    return [(name, " · ".join(each)) for name, each in told if each]


def _hours(seconds: float) -> str:
    """
    >>> _hours(50), _hours(3000), _hours(9000)
    ('50 s', '50 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
