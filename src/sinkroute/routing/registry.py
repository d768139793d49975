"""Routers by name. A new router is one file and one line here."""

from __future__ import annotations

import inspect
from typing import Any

from sinkroute._errors import unknown_name
from sinkroute.routing.load_balance import LoadBalanceRouter
from sinkroute.routing.router import Router
from sinkroute.routing.sinkhorn import SinkhornRouter
from sinkroute.routing.softmax import SoftmaxRouter
from sinkroute.routing.ssr import SSRLinearRouter, SSRSoftmaxRouter
from sinkroute.routing.z_loss import ZLossRouter

__all__ = ["create_router", "list_routers"]

ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    "load-balance": LoadBalanceRouter,
    "z-loss": ZLossRouter,
    "sinkhorn": SinkhornRouter,
    "ssr-l": SSRLinearRouter,
    "ssr-s": SSRSoftmaxRouter,
}


def list_routers() -> list[str]:
    """The names that `create_router` knows.

    >>> list_routers()
    ['softmax', 'load-balance', 'z-loss', 'sinkhorn', 'ssr-l', 'ssr-s']
    """
    return list(ROUTERS)


def create_router(name: str, *, num_experts: int, top_k: int, **options: Any) -> Router:
    """A router by its name.

    Args:
        name: one of `list_routers()`.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        options: the router's own; `help(type(router))` lists them.

    Raises:
        ValueError: an unknown name or option (the message suggests the nearest), or a value out of range.

    >>> import torch
    >>> router = create_router("ssr-s", num_experts=16, top_k=2, reg=0.05, probability=1e-3, noise=0.3)
    >>> routes = router(torch.randn(100, 16))
    >>> routes.experts.shape, routes.weights.shape, int(routes.load.sum())
    (torch.Size([100, 2]), torch.Size([100, 2]), 200)
    """
    if name not in ROUTERS:
        raise unknown_name("router", name, ROUTERS)
    router = ROUTERS[name]
    known = router_options(router)
    for option in options:
        if option not in known:
            raise unknown_name(f"option of router {name!r}:", option, known)
    return router(num_experts, top_k, **options)


def router_options(router: type[Router]) -> list[str]:
    """The keyword options of a router class.

    >>> router_options(ROUTERS["z-loss"])
    ['coefficient', 'norm_topk']
    """
    parameters = inspect.signature(router).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
