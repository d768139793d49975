"""What is timed: every router as it comes, the exact form where it has one, and the branches of those that have two.

At p = 0.001 a benchmark would need thousands of calls to see the second branch at all, so each is timed by itself
(p = 0 and p = 1); the time at any p is their weighted mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sinkroute._errors import unknown_name
from sinkroute.lab.bench.sizes import Size
from sinkroute.routing import Router, create_router, list_routers, set_step
from sinkroute.routing.registry import ROUTERS, router_options

__all__ = ["AGAIN", "BASELINE", "PROBABILITIES", "Variant", "pass_of", "training_pass", "variants_of", "with_mixtures"]

BASELINE = "softmax"
AGAIN = "softmax again"
PROBABILITIES = (0.001, 0.01, 0.1)
BRANCHES = {"softmax step": 0.0, "Sinkhorn step": 1.0}
# The paper's two are measured without their noise, too: then a softmax step is the baseline's.
NOISES: dict[str, dict[str, Any]] = {"": {}, ", no noise": {"noise": 0.0}}


class Variant(NamedTuple):
    """A router with options. `mixture` is the name under which two branches are mixed."""

    router: str
    options: dict[str, Any]
    mixture: str | None = None


def variants_of(names: Sequence[str]) -> dict[str, Variant]:
    """Name → what is timed for these routers, the baseline (and itself again, what is called a difference when there
    is none) first.

    Raises:
        ValueError: an unknown router.

    >>> list(variants_of(["ssr-dual", "ssr-ec"]))
    ['softmax', 'softmax again', 'ssr-dual', 'ssr-dual, exact', 'ssr-ec, softmax step', 'ssr-ec, Sinkhorn step']
    """
    found = {BASELINE: Variant(BASELINE, {}), AGAIN: Variant(BASELINE, {})}
    for name in names:
        if name not in ROUTERS:
            raise unknown_name("router", name, list_routers())
        if "probability" not in router_options(name):
            found.setdefault(name, Variant(name, {}))
            if "exact" in router_options(name):
                found[f"{name}, exact"] = Variant(name, {"exact": True})
            continue
        for suffix, noise in NOISES.items() if name in ("ssr-l", "ssr-s") else [("", NOISES[""])]:
            for branch, probability in BRANCHES.items():
                options = {"probability": probability, **noise}
                found[f"{name}, {branch}{suffix}"] = Variant(name, options, f"{name}{suffix}")
    return found


def with_mixtures(ratios: Mapping[str, list[float]], variants: Mapping[str, Variant]) -> dict[str, list[float]]:
    """`ratios`, and after two branches of a router those at each p, as weighted means.

    >>> pair = {"ssr-b, softmax step": [1.0], "ssr-b, Sinkhorn step": [11.0]}
    >>> with_mixtures(pair, variants_of(["ssr-b"]))["ssr-b, p = 0.1"]
    [2.0]
    """
    found: dict[str, list[float]] = {}
    before: tuple[str | None, list[float]] = (None, [])
    for name, values in ratios.items():
        found[name] = values
        mixture = variants[name].mixture
        if mixture is not None and mixture == before[0]:
            for p in PROBABILITIES:
                pairs = zip(before[1], values, strict=True)
                found[f"{mixture}, p = {p:g}"] = [(1 - p) * one + p * other for one, other in pairs]
        before = mixture, values
    return found


def training_pass(variant: Variant, size: Size, logits: Callable[[int], Tensor]) -> Callable[[], None]:
    """A function that does what a training step asks of one router: step, forward, backward to the logits.

    Args:
        variant: what is to be measured.
        size: of the problem.
        logits: width → logits (T, width): most gates give E numbers to a token, some more.

    Raises:
        ValueError: the router cannot be made for this size.
    """
    router = create_router(variant.router, num_experts=size.experts, top_k=size.top_k, **variant.options)
    gate = router.make_gate(1)  # some methods keep in their gate what they learn of a plan
    logits_TE = logits(router.logit_parts * size.experts)
    return pass_of(router.to(logits_TE.device).train(), logits_TE, gate.to(logits_TE.device))


def pass_of(router: Router, logits_TE: Tensor, gate: nn.Module | None = None) -> Callable[[], None]:
    """See `training_pass`."""
    logits_TE.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    # What comes back from the experts, by the number of them: some methods give a token more or fewer than K.
    gradients: dict[int, Tensor] = {}
    count = 0

    def call() -> None:
        nonlocal count
        set_step(router, count, total_steps=1_000_000)
        count += 1
        routes = router(logits_TE)
        width = routes.weights.shape[1]
        if width not in gradients:
            gradients[width] = torch.randn(routes.weights.shape, generator=generator).to(routes.weights)
        if routes.aux_loss is None:
            routes.weights.backward(gradients[width])
        else:
            torch.autograd.backward([routes.weights, routes.aux_loss], [gradients[width], None])
        logits_TE.grad = None

    call.gate = gate  # type: ignore[attr-defined]
    return call
