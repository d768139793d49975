"""What a patched model's routers did at first and did last: the loads of their first and last training passes.

A hook on each router adds one small copy on the device to a training pass. Nothing is waited for until somebody reads;
evaluation is not counted, a pass that is repeated for activation checkpointing once. To a compiler the copy is one
opaque operation. Nothing of it is in a `state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkroute.kernels.operations import define
from sinkroute.routing import Router
from sinkroute.routing.metrics import dead_experts, max_violation
from sinkroute.routing.routes import Routes
from sinkroute.routing.text_table import text_table

__all__ = ["WINDOW", "Tally", "tally_table"]

WINDOW = 10
"""So many passes are the first, and as many the last."""
MOST_ROWS = 16


def _tally(first_NE: Tensor, last_NE: Tensor, passes: Tensor, load_E: Tensor) -> None:
    if torch._C._current_graph_task_id() != -1:  # within a backward pass: a repetition
        return
    number = int(passes)  # on the CPU
    if number < WINDOW:
        first_NE[number].copy_(load_E)
    last_NE[number % WINDOW].copy_(load_E)
    passes.add_(1)


define(
    "tally(Tensor(a!) first_NE, Tensor(b!) last_NE, Tensor(c!) passes, Tensor load_E) -> ()",
    _tally,
    lambda first_NE, last_NE, passes, load_E: None,
)


class Tally:
    """A forward hook for one router.

    Attributes:
        first_NE, last_NE: (WINDOW, E) int64, loads of the first and of the last passes, on the router's device.
        passes: 0-d int64 on the CPU, training passes.
    """

    def __init__(self, num_experts: int) -> None:
        with torch.inference_mode(False):  # or nothing outside it could write to them
            self.passes = torch.zeros((), dtype=torch.int64, device="cpu")
            self.first_NE = torch.zeros(WINDOW, num_experts, dtype=torch.int64, device="cpu")
            self.last_NE = torch.zeros_like(self.first_NE)

    def __call__(self, router: Router, args: Any, routes: Routes) -> None:
        if not (router.training and router.balances):
            return
        if self.first_NE.device != routes.load.device:
            with torch.inference_mode(False):
                self.first_NE, self.last_NE = (part.to(routes.load.device) for part in (self.first_NE, self.last_NE))
        torch.ops.sinkroute.tally(self.first_NE, self.last_NE, self.passes, routes.load)

    def read(self, router: Router) -> _Row:
        """What happened so far; waits for the device."""
        first_E, last_E = (part.sum(0).cpu() for part in (self.first_NE, self.last_NE))
        count, state = router.plan_count, router.state
        kept = getattr(state, "plans", None)
        return _Row(
            plans=None if count is None else count.made,
            kept=None if kept is None else round(float(kept)),
            max_vio_then=float(max_violation(first_E)),
            max_vio_now=float(max_violation(last_E)),
            dead_then=int(dead_experts(first_E)),
            dead_now=int(dead_experts(last_E)),
        )


class _Row(NamedTuple):
    plans: int | None
    kept: int | None
    max_vio_then: float
    max_vio_now: float
    dead_then: int
    dead_now: int


_COLUMNS = {
    "plans": "plans",
    "kept": "kept",
    "max_vio_then": "MaxVio then",
    "max_vio_now": "MaxVio now",
    "dead_then": "dead then",
    "dead_now": "dead now",
}


def tally_table(tallies: Mapping[str, Tally], routers: Mapping[str, Router]) -> str:
    """A table with a line per layer, or per some layers where they are many, and one of all; and what its words mean.

    Args:
        tallies: path → what was counted.
        routers: the same paths → whose passes they were.
    """
    rows = {path: tally.read(routers[path]) for path, tally in tallies.items()}
    size = -(-len(rows) // MOST_ROWS)
    paths, shown = list(rows), {}
    for start in range(0, len(paths), size):
        block = paths[start : start + size]
        name = _short(block[0]) if len(block) == 1 else f"{_short(block[0])} to {_short(block[-1])}"
        shown[block[0] if name in shown else name] = _joined([rows[path] for path in block])
    shown["all"] = _joined(list(rows.values()))
    columns = [name for name in _Row._fields if getattr(shown["all"], name) is not None]
    cells = {name: {_COLUMNS[key]: getattr(row, key) for key in columns} for name, row in shown.items()}
    return "\n".join(
        [
            text_table("layer", [_COLUMNS[key] for key in columns], cells),
            f"MaxVio = max load / mean load - 1 of the loads of the first {WINDOW} training passes together (then) and",
            f"of the last {WINDOW} (now), on this rank; 0 is balanced. A dead expert has under 1 % of the mean load.",
            "Of several layers: the mean MaxVio, all their dead experts, the most plans of one.",
            *(["Plans: steps with one since patch."] if "plans" in columns else []),
            *(["Kept: plans whose potentials were kept, those before a resume included."] if "kept" in columns else []),
        ]
    )


def _joined(rows: list[_Row]) -> _Row:
    def most(name: str) -> int | None:
        known = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        return max(known) if known else None

    return _Row(
        most("plans"),
        most("kept"),
        sum(row.max_vio_then for row in rows) / len(rows),
        sum(row.max_vio_now for row in rows) / len(rows),
        sum(row.dead_then for row in rows),
        sum(row.dead_now for row in rows),
    )


def _short(path: str) -> str:
    """The numbers of a path, which tell one layer from another; a path without any as it is."""
    return ".".join(re.findall(r"\d+", path)) or path or "itself"
