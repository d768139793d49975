"""Telling the routers of a model which training step it is, and that one is over."""

from __future__ import annotations

import itertools
import operator
import warnings
import weakref

import torch
from torch import Tensor, nn

from sinkroute._errors import RankLost
from sinkroute.routing.attached import named_routers
from sinkroute.routing.ranks import Ranks
from sinkroute.routing.router import Router
from sinkroute.transport.collectives import Account

__all__ = ["STEP_ENDS", "end_step", "set_step"]


PLANLESS_STEPS = 1000
"""After so many steps that could have had a plan and had none somebody is told."""


def set_step(
    module: nn.Module,
    step: int,
    micro_batch: int = 0,
    *,
    total_steps: int | None = None,
    micro_batches: int | None = None,
) -> None:
    """Tell all routers in `module` which step this is, so that their random draws are keyed to it.

    Call it once per training step, before the forward pass (with gradient accumulation: before each micro-batch, with
    its index), always with the whole model and on all ranks: it also ends the step before (`end_step`) and numbers the
    routers that were given no `layer` in the order in which `module` holds them. Where no process holds the whole model
    (pipeline stages), give each router its `layer`.

    With activation checkpointing, a backward pass repeats forward passes under the key that was set last. Where other
    micro-batches come between a forward pass and its backward pass (pipelined schedules), call it again with that
    micro-batch before its backward pass; or, where a schedule leaves no place for that, leave `micro_batch` at 0
    throughout: the noise of a step's micro-batches is the same then, and so is that of a repetition.

    Args:
        module: a model, a layer or a router.
        step: the optimiser step, 0 or more.
        micro_batch: the micro-batch within the step, 0 or more.
        total_steps: the length of training, for schedules that span it; once is enough.
        micro_batches: how many forward passes the step has whose gradients are added up; once is enough where all steps
            have as many. A model that `sinkroute.patch` patched weighs its routers' losses by 1 / `micro_batches`.

    A module without any router is left alone, with a warning.

    Raises:
        ValueError: `step` or `micro_batch` is not an integer of 0 or more, or `total_steps` or `micro_batches` of
            1 or more; a schedule that spans the training is not told how long it is.

    >>> import sinkroute
    >>> router = sinkroute.create_router("ssr-s", num_experts=8, top_k=2)
    >>> sinkroute.set_step(router, 100)
    >>> router.step, router.layer
    (100, 0)
    """
    step, micro_batch = _count("step", step), _count("micro_batch", micro_batch)
    if total_steps is not None and _count("total_steps", total_steps) == 0:
        raise ValueError("total_steps must be an integer of 1 or more, got 0; leave it out if it is not known")
    if micro_batches is not None and _count("micro_batches", micro_batches) == 0:
        raise ValueError("micro_batches must be an integer of 1 or more, got 0; leave it out if there is one")
    routers = _routers(module, "set_step")
    for router in routers:
        router.check_step(step, total_steps)
    # A router is in the step that it was told last, before a resume too; a new one ends that.
    _end_step([router for router in routers if _is_over(router, step)])
    _number(routers)
    for router in routers:
        router.set_step(step, micro_batch, total_steps=total_steps, micro_batches=micro_batches)
    _warn_without_plans(routers)


def end_step(module: nn.Module) -> None:
    """Bring what routers remember (biases, moving averages) up to date with the loads of the step that is over.

    `set_step` does it when the next step begins. Call it yourself after the optimiser's step where something looks at
    the model in between: before a checkpoint is written on several ranks (each holds its own counts until then; one
    rank's are in its `state_dict` and survive) and before an evaluation. A second call for the same step does nothing.
    On several ranks it is a collective call: all ranks, or none.

    Raises:
        ValueError: the ranks of a process group hold other routers; found in the first call, on all ranks.
        RankLost: another rank has gone.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("loss-free", num_experts=2, top_k=1)
    >>> sinkroute.set_step(router, 0)
    >>> _ = router(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0]]))  # all want expert 0
    >>> sinkroute.end_step(router)
    >>> router.state.bias_E.tolist()
    [-0.0010000000474974513, 0.0010000000474974513]
    """
    routers = _routers(module, "end_step")
    if any(router.state is not None and router.state.current == -1 for router in routers):
        warnings.warn(
            "end_step has no step to end: call sinkroute.set_step(model, step) before every training step", stacklevel=2
        )
    _end_step(routers)


STEP_ENDS = Account()
"""Ends of steps in this process at which there was something to bring up to date, and what they sent."""


def _end_step(routers: list[Router]) -> None:
    over = [router for router in routers if router.state is not None and not router.state.has_ended]
    if not over:
        return
    try:
        with STEP_ENDS:
            _bring_up_to_date(over)
    except RankLost as lost:
        steps = sorted({router.state.current for router in over if router.state is not None})
        raise lost.during(f"the end of step {', '.join(map(str, steps))}") from lost.__cause__


@torch.no_grad()
def _bring_up_to_date(routers: list[Router]) -> None:
    together: dict[tuple[Ranks, torch.device], list[tuple[Router, Tensor]]] = {}
    for router in routers:
        if router.state is not None:
            pending = router.state.pending()
            together.setdefault((router.ranks.load, pending.device), []).append((router, pending))
    for (ranks, _), members in together.items():
        # One collective call for all layers of a device.
        parts = [pending for _, pending in members]
        ranks.require_alike(
            [len(part) for part in parts],
            parts[0].device,
            "the ranks whose routers are brought up to date together must hold the same routers (those that remember "
            "something); give create_router a process_group of ranks with the same layers, such as the data-parallel "
            "ranks of a pipeline stage",
        )
        totals = ranks.sum(torch.cat(parts)).split([len(part) for part in parts])
        for (router, _), total in zip(members, totals, strict=True):
            router.end_step(total)


def _warn_without_plans(routers: list[Router]) -> None:
    """Say once of a model whose routers are to make plans that in many steps they have made none."""
    counts = {router: router.plan_count for router in routers if router.plan_count is not None}
    late = next((router for router, count in counts.items() if count.due > PLANLESS_STEPS), None)
    if late is None or any(count.made or count.warned for count in counts.values()):
        return
    for count in counts.values():
        count.warned = True
    warnings.warn(
        f"{type(late).__name__} has made no plan in {PLANLESS_STEPS} training steps: {counts[late].cure}", stacklevel=3
    )


def _is_over(router: Router, step: int) -> bool:
    """Whether the step that the router counts has to be ended before `step` begins."""
    state = router.state
    return state is not None and state.current not in (-1, step, state.ended)


def _number(routers: list[Router]) -> None:
    """Give every router another layer; a number that it was given, or has from an earlier call, stays."""
    given = {router.layer for router in routers if router.layer_is_given}
    taken: set[int | None] = set()
    for position, router in enumerate(routers):
        if router.layer_is_given:
            continue
        if router.layer is None or router.layer in taken | given:  # new, or a copy of one that was numbered
            numbers = itertools.chain([position], itertools.count())
            router.layer = next(number for number in numbers if number not in taken | given)
        taken.add(router.layer)


# Modules of which it was said that they hold no router: once is enough.
_empty: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _routers(module: nn.Module, caller: str) -> list[Router]:
    routers = list(named_routers(module).values())
    if not routers and module not in _empty:
        _empty.add(module)
        warnings.warn(
            f"{caller}() found no router in {type(module).__name__}: neither a part that is a sinkroute.Router, as in "
            "sinkroute.MoE, nor one that sinkroute.patch attached. Call it with the model that holds the routers; a "
            "part of a model without any, such as a pipeline stage, needs no call",
            stacklevel=3,  # at who calls it
        )
    return routers


def _count(name: str, value: int) -> int:
    try:
        # Any integer type, numpy's too: the key must hash alike. (A bool is one by accident only.)
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer of 0 or more, got {value!r}; pass the optimiser's step count")
    return number
