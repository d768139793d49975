"""What adapters share: a router that fits the framework's, and, for torchtitan and DeepSpeed, how it is put in.

Their router keeps its identity: its class is swapped for one that asks a sinkroute router, so that parameters, hooks,
wrappers and lists of modules that others hold stay as they are, and it can be swapped back. A router that remembers
nothing is attached, which leaves the `state_dict` as it was; one that does is a submodule named `router`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sinkroute.routing import Router, create_router
from sinkroute.routing.attached import attach, attached, detach
from sinkroute.routing.ranks import Ranks
from sinkroute.routing.routers.ssr import SSRRouter
from sinkroute.routing.routes import Routes

__all__ = ["Patched", "fit_router", "hold", "holder", "put_in", "refuse_bias", "refuse_loss", "serves_as_theirs"]

# What the framework's router says itself.
_THEIRS = ("num_experts", "top_k", "norm_topk", "score", "groups", "top_groups", "group_score", "route_scale")


def fit_router(
    method: str,
    num_experts: int,
    top_k: int,
    options: dict[str, Any],
    owner: str,
    *,
    any_width: bool = False,
    linear_gate: bool = False,
    **theirs: Any,
) -> Router:
    """A router with the scoring of the framework's own.

    Args:
        method: a name from `sinkroute.list_routers()`.
        options: the user's, for the method.
        owner: whose scoring `theirs` is, for messages.
        any_width: whether the framework takes more or fewer than K experts for a token.
        linear_gate: whether its gate is a linear map that `ssr-fold` may be bound to.
        theirs: options that the framework's router decides.

    Raises:
        ValueError: an option that the framework's router decides; a method with a gate or a parameter of its own, or
            for which K experts for each token is not the rule.
    """
    for name in options:
        if name in _THEIRS:
            raise ValueError(
                f"{name}={options[name]!r} is read from {owner}: leave it out here, and set it where the model is "
                "configured"
            )
    # Models are built on the meta device; what a router remembers is not.
    with torch.device("cpu"):
        router = create_router(method, num_experts=num_experts, top_k=top_k, **theirs, **options)
        if type(router).make_gate is not Router.make_gate and not (linear_gate and method == "ssr-fold"):
            raise ValueError(
                f"router {method!r} has a gate of its own, and {owner} keeps its gate; take a method that reads "
                'the logits of any gate, such as "ssr-l"'
            )
        if next(router.parameters(), None) is not None:
            raise ValueError(
                f"router {method!r} with options {options} has a parameter, which no checkpoint of the model "
                "holds; give noise as a number or a schedule"
            )
        if not any_width and any(routes.chosen is not None for routes in trials(router)):
            raise ValueError(
                f"router {method!r} does not give every token top_k={top_k} experts, which {owner} must; take a "
                'method in which tokens choose, such as "ssr-b"'
            )
    return router


def trials(router: Router) -> list[Routes]:
    """What the router gives in training for a few tokens, on each of its branches; it is left as it was."""
    trial = copy.deepcopy(router).train()
    trial.process_group = trial.batch_ranks = Ranks(None)  # others are not asked
    with torch.device("cpu"):
        logits_TE = torch.zeros(router.num_experts, router.num_experts)
        routes = [trial(logits_TE)]
        if isinstance(trial, SSRRouter):
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


def refuse_bias(router: Router, what: str) -> None:
    """For layers with a bias in their choice: it can join that of methods which are plain top-k but for their plans.

    Raises:
        ValueError: the method is another.
    """
    if not router.takes_correction() or not serves_as_theirs(router):
        raise ValueError(
            f"{what} puts a bias into the choice, and {type(router).__name__} balances by a rule that has no place for "
            f'it; do without {what}, or take a method that is plain top-k between its plans, such as "ssr-s"'
        )


def serves_as_theirs(router: Router) -> bool:
    """Whether in `eval()` the method is plain top-k of the model's own scores, so that their code can serve."""
    serving = router.serving()
    return serving is not None and serving.plain


def hold(host: nn.Module, router: Router) -> None:
    """Put `router` where `holder` and `sinkroute.set_step` find it."""
    if router.state is None:
        attach(host, router)
    else:
        host.router = router


def holder(host: nn.Module) -> Router:
    """The router of `host`, in the mode of `host`: one that is attached does not hear of `train()` and `eval()`."""
    router = attached(host)
    if router is None:
        assert isinstance(host.router, Router)
        return host.router
    if router.training != host.training:
        router.train(host.training)
    return router


class Patched:
    """What `patch` did to a model.

    Attributes:
        routers: path of the framework's router in the model → the sinkroute router that it asks.
    """

    def __init__(self, hosts: dict[str, nn.Module], before: dict[str, type[nn.Module]]) -> None:
        self._hosts, self._before = hosts, before
        self.routers = {path: holder(host) for path, host in hosts.items()}

    def remove(self) -> None:
        """Give the model its own routers back. A second call does nothing."""
        for path, host in self._hosts.items():
            host.__class__ = self._before[path]
            detach(host)
            if "router" in host._modules:
                del host.router
        self._hosts = {}


def put_in(
    model: nn.Module, fit: Callable[[str, nn.Module], tuple[type[nn.Module], Router] | None], what: str
) -> Patched:
    """Swap the classes of all modules for which `fit` gives one and a router to hold; of none if one is refused.

    Raises:
        ValueError: there is nothing to swap.
    """
    fitted = {path: (part, new) for path, part in model.named_modules() if (new := fit(path, part)) is not None}
    if not fitted:
        raise ValueError(
            f"model {type(model).__name__} holds no {what}: there is nothing to patch; pass the model that holds the "
            "mixture-of-experts layers"
        )
    before = {path: type(part) for path, (part, _) in fitted.items()}
    for part, (cls, router) in fitted.values():
        part.__class__ = cls
        hold(part, router.train(part.training))
    return Patched({path: part for path, (part, _) in fitted.items()}, before)
