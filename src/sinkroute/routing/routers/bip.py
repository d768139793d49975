"""BIP-based balancing: every batch is balanced before it is routed (Sun, arXiv 2502.15451).

Of scores s, the best assignment in which no token has more than K experts and no expert more than its share of tokens,

    max Σ s_tj x_tj,    x_tj ∈ {0, 1},    Σ_j x_tj ≤ K,    Σ_t x_tj ≤ cap = K·T/E

is a binary integer program. The dual of its linear relaxation has a price p_t ≥ 0 for every token and q_j ≥ 0 for every
expert. It is minimised in one and then the other, a few times, beginning with the q of the batch before:

    p_t ← max(0, the (K+1)-th largest over j of s_tj − q_j)
    q_j ← max(0, the (cap+1)-th largest over t of s_tj − p_t)

Chosen are the K largest of s − q, and weighed by s. A token's experts depend on its whole micro-batch while training.
Quantile balancing is one such update, *after* the choice and without max(0, ·): with it busy experts are held back, but
nothing draws tokens to idle ones. And where many p are 0, as with the scores of a softmax that is sure of itself, steps
in p and q in turn stop short of the minimum, and kept q creep on: loads of such gates are balanced at first, and worse
later. There sigmoid scores help, or `warm_start=False` with some 14 iterations.

The paper's text was not at hand. The program and both updates are from accounts of it (Su, kexue.fm/archives/11619, and
public reviews), which leave open what are readings here:

    warm start       q is kept, and a batch begins with it: the paper "maintains" q, and few iterations from 0 do not
                     balance as it reports
    over a step      every micro-batch of every rank has a q that begins with that of the step before. Kept is their
                     mean by tokens, so that neither repetition nor order changes a route. With one micro-batch on one
                     rank it is the paper's
    iterations       4
    serving          the K largest of s − q with the q that was kept last, which does not change then
    K·T/E not whole  a straight line between two order statistics, as in quantile balancing

The paper's forms for tokens that come one by one, and for little memory, are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkroute.routing.card import Card
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.routing.routers.quantile import balancing_quantile
from sinkroute.routing.routes import Routes
from sinkroute.routing.scores import scores
from sinkroute.routing.serving import Serving
from sinkroute.routing.state import RouterState

__all__ = ["BIPRouter"]


class BIPRouter(Router):
    """Top-k of score − price of the expert, the prices found on each micro-batch before its choice. Without groups.

    Attributes:
        state: holds `bias_E` (E,) float32: −q.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("bip", num_experts=4, top_k=1)
    >>> logits_TE = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 0, 0, 0])
    >>> sinkroute.set_step(router, 0)
    >>> load_E = router(logits_TE).load  # on the first step: a share is 100, and plain top-k gives expert 0 some 380
    >>> bool(load_E.max() < 105)
    True
    """

    card = Card("yes", "yes", "some rounds of prices, then top-k")
    needs_step = True
    keeps_groups = False
    state: RouterState

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        iterations: int = option(4, "how often the prices of tokens and of experts are updated in a pass", least=1)
        warm_start: bool = option(
            True, "whether the prices of experts begin with those of the step before; else with 0, in every pass"
        )

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(num_experts, top_k, **options)
        self.state = RouterState(
            num_experts, sums={"bias_sum": num_experts, "tokens": 1}, bias_E=torch.zeros(num_experts, device="cpu")
        )

    def choice_bias(self) -> Serving:
        return Serving(self.state.bias_E, "scores")

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        if self.top_k == self.num_experts or not len(logits_TE):  # every token has every expert, or there is none
            return self.topk(logits_TE)
        scores_TE = scores(logits_TE.detach(), self.score)
        bias_E = self._prices(scores_TE, token_mask).neg()
        experts_TK = self.choose(scores_TE + bias_E)
        return Routes(experts_TK, self.weigh(logits_TE, experts_TK), branch="assignment", potentials=bias_E)

    def _prices(self, scores_TE: Tensor, token_mask: Tensor | None) -> Tensor:
        """(E,) q. Without a real token 0."""
        bias_E = self.state.bias_E.to(scores_TE.dtype)
        q_E = -bias_E if self.warm_start else torch.zeros_like(bias_E)
        for _ in range(self.iterations):
            p_T1 = (scores_TE - q_E).topk(self.top_k + 1, dim=1).values[:, -1:].clamp(min=0)
            # The largest of s − p are the smallest of p − s.
            q_E = balancing_quantile(p_T1 - scores_TE, self.top_k / self.num_experts, token_mask).neg().clamp(min=0)
        return q_E

    @torch.no_grad()
    def step_sums(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> dict[str, Tensor]:
        if routes.potentials is None:
            return {}
        if token_mask is None:
            tokens = torch.full((1,), len(logits_TE), dtype=torch.float64, device=logits_TE.device)
        else:
            tokens = token_mask.sum().double().view(1)
        return {"bias_sum": routes.potentials.double() * tokens, "tokens": tokens}

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        bias_E, tokens = self.state.bias_E, sums["tokens"]
        bias_E.copy_(torch.where(tokens > 0, sums["bias_sum"] / tokens.clamp(min=1), bias_E))
