"""`sinkroute routers`: the ways of routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["run"]


@dataclass
class RoutersCommand:
    """The ways of routing, or what one of them can be told."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    """A router: its options, with their defaults and what they mean."""


def run(arguments: list[str], console: Console) -> int:
    command = tyro.cli(RoutersCommand, args=arguments, prog="sinkroute routers")

    from sinkroute.lab.overview import overview
    from sinkroute.routing.options import described
    from sinkroute.routing.registry import router_class

    if command.name is None:
        console.print(overview(console.width), highlight=False, markup=False, soft_wrap=True)
        return 0
    table = Table(show_lines=True)
    for column in ("option", "default", "what it means"):
        table.add_column(column, overflow="fold")
    for option in described(router_class(command.name).Options):
        named = f"{escape(option.name)}\n[dim]{escape(option.kind)}[/]"
        table.add_row(named, escape(option.default), escape(option.about))
    console.print(table)
    return 0
