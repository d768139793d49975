"""`sinkroute report`: a page about runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape

from sinkroute.commands import UsageError

__all__ = ["run"]


@dataclass
class ReportCommand:
    """Write one self-contained HTML page about runs, finished or not, and print their table."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Folders of runs, or folders that hold such folders."""
    out: str | None = None
    """The page; by default report.html in the first folder."""
    picture: str | None = None
    """Also write the summary picture here (.png or .svg)."""
    title: Annotated[str, tyro.conf.arg(help="Heading of the page.")] = "sinkroute report"


def run(arguments: list[str], console: Console) -> int:
    command = tyro.cli(ReportCommand, args=arguments, prog="sinkroute report")
    if not command.runs:
        raise UsageError("report needs a RUN: sinkroute report runs/demo")

    from sinkroute.lab.study.page import write_page, write_picture
    from sinkroute.lab.study.results import compare_runs
    from sinkroute.lab.study.runs import read_runs
    from sinkroute.lab.study.tables import print_results

    found = compare_runs(read_runs(command.runs), command.title)
    print_results(found, console)
    out = Path(command.out) if command.out else Path(command.runs[0]) / "report.html"
    write_page(found, out)
    console.print(f"Report: [bold]{escape(str(out))}[/]", highlight=False, soft_wrap=True)
    if command.picture:
        write_picture(found, Path(command.picture))
        console.print(f"Picture: [bold]{escape(command.picture)}[/]", highlight=False, soft_wrap=True)
    return 0
