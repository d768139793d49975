"""Routers by name. A new router is one file and one line here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sinkroute._errors import unknown_name
from sinkroute.routing.router import Router
from sinkroute.routing.routers.base_layers import BaseRouter
from sinkroute.routing.routers.bip import BIPRouter
from sinkroute.routing.routers.expert_choice import ExpertChoiceRouter
from sinkroute.routing.routers.hash import HashRouter
from sinkroute.routing.routers.loss_free import LossFreeRouter
from sinkroute.routing.routers.noisy import NoisyRouter
from sinkroute.routing.routers.quantile import QuantileRouter
from sinkroute.routing.routers.sinkhorn import SinkhornRouter
from sinkroute.routing.routers.smebu import SMEBURouter
from sinkroute.routing.routers.smoe_dropout import SMoEDropoutRouter
from sinkroute.routing.routers.softmax import SoftmaxRouter
from sinkroute.routing.routers.ssr import SSRLinearRouter, SSRSoftmaxRouter
from sinkroute.routing.routers.ssr_b import SSRBalancedRouter
from sinkroute.routing.routers.ssr_bias import SSRBiasRouter
from sinkroute.routing.routers.ssr_dual import SSRDualRouter
from sinkroute.routing.routers.ssr_ec import SSRExpertChoiceRouter
from sinkroute.routing.routers.ssr_fold import SSRFoldRouter
from sinkroute.routing.routers.ssr_literal import SSRLinearLiteralRouter, SSRSoftmaxLiteralRouter
from sinkroute.routing.routers.stable_moe import StableMoERouter
from sinkroute.routing.routers.v_moe_noise import VMoENoiseRouter
from sinkroute.routing.routers.with_loss import GlobalLoadBalanceRouter, GShardRouter, LoadBalanceRouter, ZLossRouter
from sinkroute.routing.routers.xmoe import XMoERouter

__all__ = ["RECOMMENDED", "create_router", "list_routers"]

# What is taken where no router is named: it balances in training and in serving, from the first steps on.
RECOMMENDED = "ssr-dual"

ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    # A loss, or a bias, against the imbalance.
    "load-balance": LoadBalanceRouter,
    "gshard": GShardRouter,
    "global-load-balance": GlobalLoadBalanceRouter,
    "z-loss": ZLossRouter,
    "loss-free": LossFreeRouter,
    "smebu": SMEBURouter,
    "quantile": QuantileRouter,
    # Noise, and losses on what it makes likely.
    "noisy": NoisyRouter,
    "v-moe-noise": VMoENoiseRouter,
    # Assignments.
    "sinkhorn": SinkhornRouter,
    "base": BaseRouter,
    "bip": BIPRouter,
    "expert-choice": ExpertChoiceRouter,
    # Gates that no other method has.
    "xmoe": XMoERouter,
    "stable-moe": StableMoERouter,
    "smoe-dropout": SMoEDropoutRouter,
    "hash": HashRouter,
    # Selective Sinkhorn routing: the paper's two, the same with another reading of its noise, and ours.
    "ssr-l": SSRLinearRouter,
    "ssr-s": SSRSoftmaxRouter,
    "ssr-l-literal": SSRLinearLiteralRouter,
    "ssr-s-literal": SSRSoftmaxLiteralRouter,
    "ssr-b": SSRBalancedRouter,
    "ssr-ec": SSRExpertChoiceRouter,
    "ssr-bias": SSRBiasRouter,
    "ssr-fold": SSRFoldRouter,
    "ssr-dual": SSRDualRouter,
}


def list_routers() -> list[str]:
    """The names that `create_router` knows.

    >>> list_routers()[:2]
    ['softmax', 'load-balance']
    """
    return list(ROUTERS)


def create_router(name: str, *, num_experts: int, top_k: int, **options: Any) -> Router:
    """A router by its name.

    Args:
        name: one of `list_routers()`.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        options: those of the method; `help(type(router))` and `sinkroute routers NAME` list them.

    Raises:
        ValueError: an unknown name or option (the message suggests the nearest), or a value out of range.

    >>> import torch
    >>> router = create_router("ssr-s", num_experts=16, top_k=2, reg=0.05, probability=1e-3, noise=0.3)
    >>> routes = router(torch.randn(100, 16))
    >>> routes.experts.shape, routes.weights.shape, int(routes.load.sum())
    (torch.Size([100, 2]), torch.Size([100, 2]), 200)
    """
    router, known = router_class(name), router_options(name)
    for option in options:
        if option not in known:
            raise unknown_name(f"option of router {name!r}:", option, known)
    return router(num_experts, top_k, **options)


def router_class(name: str) -> type[Router]:
    """The class of a router by its name.

    Raises:
        ValueError: an unknown name; the message suggests the nearest.

    >>> router_class("softmax").__name__
    'SoftmaxRouter'
    """
    if name not in ROUTERS:
        raise unknown_name("router", name, ROUTERS)
    return ROUTERS[name]


def router_options(name: str) -> list[str]:
    """The names of the options that a router takes by keyword.

    >>> router_options("z-loss")[-1]
    'coefficient'
    """
    return [each.name for each in fields(router_class(name).Options)]
