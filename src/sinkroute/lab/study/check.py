"""What would fail in each run is told once, before the first: a router, an option, an attack, or data not there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sinkroute.lab.models import make_model
from sinkroute.lab.run import kind_of, require_modes
from sinkroute.lab.study.cells import Cell
from sinkroute.lab.study.worker import load_cell_data
from sinkroute.lab.tasks import make_task

__all__ = ["check_cells"]


def check_cells(cells: Sequence[Cell], path: str = "--set data.path=PATH", *, data: bool = True) -> None:
    """Make each method's model without memory, load each data set once, and look at what is asked of the evaluation.

    Args:
        cells: that are to run.
        path: how the command line says where data lie.
        data: whether to read the data and what needs them, the attacks; not where the runs are on other machines.

    Raises:
        ValueError: what the first run of a kind would stumble over, with its name and the cure.
    """
    seen: set[str] = set()
    for cell in cells:
        config = cell.config
        kind = repr((config.data, config.model, config.router, config.eval))
        if kind in seen:
            continue
        seen.add(kind)
        who = f"{cell.size} {cell.method}".strip()
        try:
            with torch.device("meta"):
                router = make_model(config).moe_layers[0].router
            require_modes(config, router)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{who}: {error}") from error
        if not data:
            continue
        try:
            loaded = load_cell_data(config)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            raise ValueError(
                f"no run is begun: {who} cannot read its data. {error}. In this command: {path}"
            ) from error
        try:
            task = make_task(config, loaded)
            for name, attack in config.eval.attacks.items():
                task.check_attack(kind_of(name), attack)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{who}: {error}") from error
