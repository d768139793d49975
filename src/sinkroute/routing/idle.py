"""Passes in training mode that are no training: rollouts, reference models, trials."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from sinkroute.routing.attached import named_routers
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes

__all__ = ["no_balancing"]


@contextlib.contextmanager
def no_balancing(module: nn.Module) -> Iterator[None]:
    """Inside, no pass of `module` is one of the training, whatever `train()` says.

    Its routers choose as they do when serving. They count nothing, no loss, state or `LoadMonitor` hears of the pass,
    and dropout and the like are left as they are. For what runs in `train()` and is not trained on: the rollouts of
    reinforcement learning, a reference pass, a trial.

    A model that `sinkroute.patch` patched recognises most of these: a pass that keeps no graph (`torch.no_grad`,
    `torch.inference_mode`), and so `generate`, is not one of the training, unless a `torch.autograd.Function` runs it:
    reentrant activation checkpointing does, to repeat it later. The layers of `sinkroute.MoE` do not see a pass as a
    whole, and need this.

    Args:
        module: a model, a layer or a router.

    >>> import sinkroute, torch
    >>> router = sinkroute.create_router("loss-free", num_experts=2, top_k=1).train()
    >>> sinkroute.set_step(router, 0)
    >>> with sinkroute.no_balancing(router):
    ...     _ = router(torch.tensor([[1.0, 0.0]]))
    >>> router.state.load_E
    tensor([0, 0])
    """
    routers = [router for router in named_routers(module).values() if router.balances]
    for router in routers:
        router.balances = False
        vars(router)["forward"] = partial(_serve, router)
    try:
        yield
    finally:
        for router in routers:
            router.balances = True
            vars(router).pop("forward")


def _serve(router: Router, *args: Any, **kwargs: Any) -> Routes:
    """The router's forward pass in `eval()`."""
    training, router.training = router.training, False
    try:
        return type(router).forward(router, *args, **kwargs)
    finally:
        router.training = training
