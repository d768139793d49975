"""Scores on which Megatron-Core's `sinkhorn` is known to go wrong, and what `solve` makes of the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sinkroute

from .clock import TooLong, limit
from .oracle import plan_error
from .peers import megatron

T, E, K = 4096, 64, 2
CAPTION = "error: of rows and columns of the plan; NaN: its entries; load of the busiest expert after top-k"


def cases(seed: int) -> dict[str, Tensor]:
    """Gate logits (T, E); all the same but for what the name says."""
    plain_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    hot_TE, spike_TE = plain_TE.clone(), plain_TE.clone()
    hot_TE[:, :8] += 5
    spike_TE[17, 3] = 90
    return {
        "nothing special": plain_TE,
        "8 of 64 experts hotter by 5": hot_TE,
        "one score of 90": spike_TE,
        "all logits lower by 40": plain_TE - 40,
        "all tokens identical": plain_TE[:1].expand(T, E).contiguous(),
    }


@dataclass
class Outcome:
    """`error` of the plan's rows and columns; `not_a_number`: entries; `load`: of the busiest expert over the mean."""

    error: float
    not_a_number: int
    load: float
    seconds: float
    note: str


def outcome(route: Callable[[], tuple[Tensor, Tensor, str]], seconds: float) -> Outcome:
    """`route` gives a plan, the experts chosen and what it has to say about itself."""
    begin = time.perf_counter()
    try:
        with limit(seconds):
            plan_TE, experts_TK, note = route()
    except TooLong as error:
        return Outcome(math.nan, 0, math.nan, time.perf_counter() - begin, str(error))
    spent = time.perf_counter() - begin
    load = float(experts_TK.flatten().bincount(minlength=E).max()) / (T * K / E)
    return Outcome(plan_error(plan_TE), int(plan_TE.isnan().sum()), load, spent, note)


def megatron_route(logits_TE: Tensor) -> tuple[Tensor, Tensor, str]:
    plan_TE = megatron.sinkhorn(logits_TE)
    return plan_TE, plan_TE.topk(K, dim=1).indices, "says nothing"


def our_route(logits_TE: Tensor, method: str) -> tuple[Tensor, Tensor, str]:
    plan = sinkroute.solve(logits_TE, reg=1.0, method=method)  # Megatron-Core has no temperature: ξ = 1
    says = f"{'' if plan.converged else 'not '}converged, {float(plan.column_error):.0e} in {plan.passes} passes"
    return plan.matrix(), plan.topk(K)[1], says


def measure_faults(method: str, seed: int, seconds: float) -> dict[str, dict[str, dict[str, object]]]:
    """By case and by solver."""
    return {
        case: {
            "Megatron-Core": asdict(outcome(partial(megatron_route, logits_TE), seconds)),
            f"sinkroute {method}": asdict(outcome(partial(our_route, logits_TE, method), seconds)),
        }
        for case, logits_TE in cases(seed).items()
    }


def show_faults(found: dict[str, dict[str, dict[str, object]]], console: Console) -> None:
    table = Table(
        title=f"Scores that are hard on exponentials ({T}x{E}, top-{K}, reg 1)", box=SIMPLE_HEAD, caption=CAPTION
    )
    for column in ("scores", "solver", "error", "NaN", "busiest / mean", "ms", "it says"):
        table.add_column(column, justify="left" if column in ("scores", "solver", "it says") else "right")
    for case, by_solver in found.items():
        for solver, fields in by_solver.items():
            one = Outcome(**fields)  # type: ignore[arg-type]
            figures = (f"{one.error:.1e}", str(one.not_a_number), f"{one.load:.2f}", f"{1e3 * one.seconds:.1f}")
            table.add_row(case, solver, *figures, one.note)
        table.add_section()
    console.print(table)
