"""A router that fits the framework's own: what it takes over, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sinkroute.adapters._links import BiasLink, GateLink
from sinkroute.adapters._tally import Tally
from sinkroute.routing import Router, create_router
from sinkroute.routing.ranks import Ranks, RouterRanks
from sinkroute.routing.registry import ROUTERS, router_options
from sinkroute.routing.routes import Routes

__all__ = [
    "FRAMEWORKS",
    "SCORING",
    "fit_router",
    "frameworks",
    "has_gate",
    "is_asked",
    "join_bias",
    "join_gate",
    "on_scores",
    "refuse_bias",
    "refuse_loss",
]

# What the framework's router says itself, beside num_experts and top_k.
SCORING = ("score", "norm_topk", "groups", "top_groups", "group_score", "route_scale")


class Takes(NamedTuple):
    """What a framework's layers take: any number of experts for a token, an auxiliary loss."""

    any_width: bool
    loss: bool


# Some layers of a framework take less; its `patch` refuses a router there, with the reason.
FRAMEWORKS = {
    "Hugging Face": Takes(any_width=True, loss=True),
    "Megatron-Core": Takes(any_width=False, loss=True),
    "torchtitan": Takes(any_width=False, loss=False),
    "DeepSpeed": Takes(any_width=False, loss=True),
}


def frameworks(router: Router) -> list[str]:
    """The frameworks whose layers the router can route.

    >>> frameworks(create_router("load-balance", num_experts=4, top_k=2))
    ['Hugging Face', 'Megatron-Core', 'DeepSpeed']
    """
    if has_gate(router) or next(router.parameters(), None) is not None:
        return []
    routes = trials(router)
    wide, loss = any(part.chosen is not None for part in routes), any(part.aux_loss is not None for part in routes)
    return [name for name, takes in FRAMEWORKS.items() if (takes.any_width or not wide) and (takes.loss or not loss)]


def fit_router(
    name: str,
    num_experts: int,
    top_k: int,
    options: dict[str, Any],
    owner: str,
    *,
    any_width: bool = False,
    **theirs: Any,
) -> Router:
    """A router with the scoring of the framework's own.

    Args:
        name: one of `sinkroute.list_routers()`.
        options: the user's, for that router.
        owner: whose scoring `theirs` is, for messages.
        any_width: whether the framework takes more or fewer than K experts for a token.
        theirs: options that the framework's router decides.

    Raises:
        ValueError: an option that the framework's router decides; a method that brings a gate or a parameter, or
            for which K experts for each token is not the rule.
    """
    for option in options:
        if option in ("num_experts", "top_k", *SCORING):
            raise ValueError(
                f"{option}={options[option]!r} is read from {owner}: leave it out here, and set it where the model is "
                "configured"
            )
    # Models are built on the meta device; what a router remembers is not.
    with torch.device("cpu"):
        router = create_router(name, num_experts=num_experts, top_k=top_k, **theirs, **options)
        if has_gate(router):
            raise ValueError(
                f"router {name!r} brings a gate, and {owner} keeps its gate; take "
                'a method that reads the logits of any gate, such as "ssr-l"'
            )
        if next(router.parameters(), None) is not None:
            raise ValueError(
                f"router {name!r} with options {options} has a parameter, which no checkpoint of the model "
                "holds; give noise as a number or a schedule"
            )
        if not any_width and any(routes.chosen is not None for routes in trials(router)):
            raise ValueError(
                f"router {name!r} does not give every token top_k={top_k} experts, which {owner} must; take a "
                'method in which tokens choose, such as "ssr-b"'
            )
    return router


def has_gate(router: Router) -> bool:
    """Whether the method makes logits in its way, by a gate that it brings."""
    return type(router).make_gate is not Router.make_gate and not router.moves_gate


def trials(router: Router) -> list[Routes]:
    """What the router gives in training for a few tokens, on each of its branches; it is left as it was."""
    trial = copy.deepcopy(router).train()
    trial.ranks = RouterRanks.of(None)._replace(load=Ranks(None), noise=Ranks(None))  # others are not asked
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a gate that it is yet to be told of
        logits_TE = torch.zeros(router.num_experts, router.num_experts)
        routes = [trial(logits_TE)]
        if trial.sinkhorn_now is not None:
            trial.sinkhorn_now = not trial.sinkhorn_now
            routes.append(trial(logits_TE))
    return routes


def refuse_loss(router: Router, owner: str) -> None:
    """For frameworks that have no place for an auxiliary loss.

    Raises:
        ValueError: the router has one.
    """
    if any(routes.aux_loss is not None for routes in trials(router)):
        raise ValueError(
            f"{type(router).__name__} has an auxiliary loss, and nothing in {owner} adds it to the training loss; take "
            'a method without one, such as "ssr-s"'
        )


def on_scores(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options for a model whose bias is on the scores: that of a method that can have it on either is there too."""
    if name in ROUTERS and "bias_on" in router_options(name):
        return {"bias_on": "scores", **options}
    return options


def join_bias(router: Router, what: str, find: Callable[[], Tensor]) -> None:
    """Let the router and a bias on the scores, which the framework's layer has, be one balancing rule.

    The bias of a method that serves with one is the framework's from now on: tied to it, and moved by our rule alone.
    With methods that are plain top-k but for their plans it takes part in the choice, and stays the framework's.

    Args:
        what: the framework's option that made the bias.
        find: gives its tensor (E,), which is asked each time.

    Raises:
        ValueError: the method has a bias on the logits, or another rule.
    """
    serving = router.serving()
    if router.moves_gate:
        raise ValueError(
            f"{type(router).__name__} balances the gate, and {what} puts a bias into the choice, which would undo it; "
            'take a method that moves this bias, such as "ssr-dual"'
        )
    if serving is None or serving.plain:
        refuse_bias(router, what)
        return
    if serving.on != "scores":
        raise ValueError(
            f"{type(router).__name__} serves with a bias on the {serving.on}, and that of {what} is on the scores: "
            'what is learned could not be served by it; take a method whose bias goes there, such as "ssr-dual", '
            '"ssr-bias", or "quantile" with scope="batch"'
        )
    router.links.append(BiasLink(router, find))
    router.links[-1].pull()


def join_gate(
    router: Router,
    what: str,
    owner: nn.Module,
    gate: nn.Module,
    move_copy: Callable[[Tensor, Tensor], bool] = lambda moved, move: False,
) -> None:
    """Have potentials of logits, if the router serves with such, go into the gate, which then is what serves.

    Args:
        what: of the framework, for messages.
        owner: holds the gate and stays what it is.
        gate: linear, `owner` or a part of it.
        move_copy: see `GateLink`.

    Raises:
        ValueError: the gate is frozen.
    """
    serving = router.serving()
    if not router.potentials() or (serving is not None and not serving.plain and serving.on != "logits"):
        return
    name = "weight" if getattr(gate, "bias", None) is None else "bias"
    if not getattr(gate, name).requires_grad:
        raise ValueError(
            f"{type(router).__name__} moves the gate's {name} of {what}, which is frozen: its checkpoints may leave it "
            'out; let it be trained, or take a method that leaves the gate alone, such as "ssr-l"'
        )
    prefix = next(path for path, part in owner.named_modules() if part is gate)
    router.links.append(GateLink(router, owner, f"{prefix}.{name}" if prefix else name, move_copy))


def refuse_bias(router: Router, what: str) -> None:
    """For layers with a bias in their choice: it can join that of methods which are plain top-k but for their plans.

    Raises:
        ValueError: the method is another.
    """
    serving = router.serving()
    if not router.takes_correction() or serving is None or not serving.plain:
        raise ValueError(
            f"{what} puts a bias into the choice, and {type(router).__name__} balances by a rule that has no place for "
            f'it; do without {what}, or take a method that is plain top-k between its plans, such as "ssr-s"'
        )


def is_asked(router: Router) -> bool:
    """Whether the router is asked in this pass: where the framework's own choice stays, only if somebody watches."""
    watched = any(not isinstance(hook, Tally) for hook in router._forward_hooks.values())  # in evaluation
    return router.training or not router.is_plain() or watched
