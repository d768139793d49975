"""`sinkroute models`: the training presets."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

__all__ = ["run"]


@dataclass
class ModelsCommand:
    """List the training presets: what each trains, on what and how long, with exact parameter counts.

    Nothing is trained: models are built on the meta device, without memory.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")] = ()
    """Presets or YAML files; by default all presets."""
    json: bool = False
    """Print JSON instead of a table."""


def run(arguments: list[str], console: Console) -> int:
    command = tyro.cli(ModelsCommand, args=arguments, prog="sinkroute models")

    from sinkroute.lab.models.listing import list_models, model_table

    models = list_models(command.names)
    if command.json:
        sys.stdout.write(json.dumps([model.json() for model in models], indent=1) + "\n")
    else:
        console.print(model_table(models))
    return 0
