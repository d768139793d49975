"""Telling the routers of a model which training step it is."""

from __future__ import annotations

import operator

from torch import nn

from sinkroute.routing.router import Router

__all__ = ["set_step"]


def set_step(module: nn.Module, step: int, micro_batch: int = 0) -> None:
    """Tell all routers in `module` which step this is, so that their random draws are keyed to it.

    Call it once per training step, before the forward pass (with gradient accumulation: before each micro-batch, with
    its index), always with the whole model: it also numbers the routers that were given no `layer` in the order in
    which `module` holds them. Where no process holds the whole model (pipeline stages), give each router its `layer`.

    Args:
        module: a model, a layer or a router.
        step: the optimiser step, 0 or more.
        micro_batch: the micro-batch within the step, 0 or more.

    Raises:
        ValueError: `step` or `micro_batch` is not an integer of 0 or more.

    >>> import sinkroute
    >>> router = sinkroute.create_router("ssr-s", num_experts=8, top_k=2)
    >>> sinkroute.set_step(router, 100)
    >>> router.step, router.layer
    (100, 0)
    """
    step, micro_batch = _count("step", step), _count("micro_batch", micro_batch)
    routers = [part for part in module.modules() if isinstance(part, Router)]
    layers = [router.layer for router in routers]
    # Two alike: routers were copied or added after the first call. Their draws must differ, so all are numbered anew.
    again = len(set(layers)) < len(layers)
    for position, router in enumerate(routers):
        if router.layer is None or (again and not router.layer_is_given):
            router.layer = position
        router.step, router.micro_batch, router.step_was_set = step, micro_batch, True


def _count(name: str, value: int) -> int:
    try:
        # Any integer type, numpy's too: the key must hash alike. (A bool is one by accident only.)
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer of 0 or more, got {value!r}; pass the optimiser's step count")
    return number
