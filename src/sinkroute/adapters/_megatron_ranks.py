"""Which ranks share what in Megatron-Core, by the names of its process groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal, get_args

from torch import nn

from sinkroute._errors import unknown_name
from sinkroute.routing.ranks import Ranks, RouterRanks

__all__ = ["PlanRanks", "check_plan_ranks", "find_ranks", "groups_around"]

# Groups of one pipeline stage, whose ranks hold other tokens of a layer each: tensor-parallel ranks do by sequence
# parallelism, without which Megatron's layer refuses to train. Groups across stages have different layers.
PlanRanks = Literal["tp_cp", "tp_dp_cp", "tp", "cp", "dp", "dp_cp", "ep", "tp_ep"]


def check_plan_ranks(plan_ranks: str, options: dict[str, Any]) -> None:
    """Refuse the name of no group that a plan could be of, and a group by another option.

    Raises:
        ValueError: see above.
    """
    if plan_ranks not in get_args(PlanRanks):
        raise unknown_name("plan_ranks", plan_ranks, get_args(PlanRanks))
    for option, cure in (
        ("process_group", f"plan_ranks says whose tokens a plan balances, one of {', '.join(get_args(PlanRanks))}"),
        ("layer", "Megatron numbers its layers: leave it out"),
    ):
        if option in options:
            raise ValueError(f"{option}={options[option]!r}: {cure}")


def find_ranks(groups: Any, plan_ranks: str) -> RouterRanks:
    """The ranks of a layer's router.

    What is counted and whose tokens differ: all ranks that have the layer. Never "all ranks", which would add up the
    loads of the layers of different stages.

    Args:
        groups: Megatron's `ProcessGroupCollection`, or part of one.
        plan_ranks: the name of a group in it.

    Raises:
        ValueError: it has no such group.
    """
    there = {name: group for name in get_args(PlanRanks) if (group := getattr(groups, name, None)) is not None}
    for name in ("tp_dp_cp", plan_ranks):
        if name not in there:
            raise ValueError(
                f"plan_ranks={plan_ranks!r} needs the group {name!r}, which the layer's pg_collection lacks; it has "
                f"{', '.join(there) or 'no group of a stage'}: take one of these, or build the model with a "
                "ProcessGroupCollection that has it, such as ProcessGroupCollection.use_mpu_process_groups()"
            )
    stage = Ranks(there["tp_dp_cp"])
    return RouterRanks(plan=Ranks(there[plan_ranks]), load=stage, noise=stage)


def groups_around(model: nn.Module, path: str, router: Any) -> Any:
    """The process groups of the part of a built model that its router at `path` belongs to; or those that it keeps."""
    parts = path.split(".")
    for end in reversed(range(len(parts))):
        found = getattr(model.get_submodule(".".join(parts[:end])), "pg_collection", None)
        if found is not None:
            return found
    kept = {
        "tp": router.tp_group,
        "cp": router.cp_group,
        "tp_cp": router.tp_cp_group,
        "tp_dp_cp": router.tp_dp_cp_group,
    }
    return SimpleNamespace(**kept)
