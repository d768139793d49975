"""SSR-EC: expert choice on Sinkhorn steps. The paper (arXiv 2511.08972) leaves this open.

A column of the plan says how much of each token an expert should carry. On a Sinkhorn step each expert takes the
T·K/E tokens of which it should carry most, so that loads are equal; a token may get more or fewer than K experts, or
none, and its weights are the plan's entries, renormalised over those that took it.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from sinkroute.routing.expert_side import take_best_tokens
from sinkroute.routing.routers.ssr import Cost, PlanChoice, SSROptions, SSRRouter, read_cost
from sinkroute.transport import Plan

__all__ = ["SSRExpertChoiceRouter"]


class SSRExpertChoiceRouter(SSRRouter):
    """SSR whose Sinkhorn steps let the experts choose, by the plan's columns.

    Args:
        cost: `"linear"` or `"softmax"`.
        options: see `SSRRouter`. Without groups.
    """

    def __init__(self, num_experts: int, top_k: int, *, cost: Cost = "linear", **options: Unpack[SSROptions]) -> None:
        self.cost = read_cost(cost)
        super().__init__(num_experts, top_k, **options)
        self.refuse_groups()

    def choose_on_plan(self, plan: Plan, token_mask: Tensor | None) -> PlanChoice:
        entries_TE = plan.matrix().detach()
        experts_TK, chosen_TK = take_best_tokens(entries_TE, self.top_k, token_mask, self.top_k, self.tie_seed())
        return PlanChoice(experts_TK, chosen_TK, plan.potentials)
