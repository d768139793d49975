"""SSR-EC: expert choice on Sinkhorn steps. The paper (arXiv 2511.08972) leaves this open.

A column of the plan says how much of each token an expert should carry. On a Sinkhorn step each expert takes the
T·K/E tokens of which it should carry most, so that loads are equal; a token may get more or fewer than K experts, or
none, and its weights are the plan's entries, renormalised over those that took it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sinkroute.routing.card import Card
from sinkroute.routing.expert_side import take_best_tokens
from sinkroute.routing.options import option
from sinkroute.routing.routers.ssr import Cost, SSRRouter
from sinkroute.transport import Plan

__all__ = ["SSRExpertChoiceRouter"]


class SSRExpertChoiceRouter(SSRRouter):
    """SSR whose Sinkhorn steps let the experts choose, by the plan's columns. Without groups."""

    card = Card("plans", "no", "top-k; on a share p of the steps a plan and the best tokens of every expert")
    keeps_groups = False

    @dataclass(frozen=True, kw_only=True)
    class Options(SSRRouter.Options):
        cost: Cost = option("linear", '"linear" or "softmax"')

    def choose_by_plan(self, plan: Plan, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        entries_TE = plan.matrix().detach()
        experts_TK, chosen_TK = take_best_tokens(entries_TE, self.top_k, token_mask, self.top_k, self.tie_seed())
        return experts_TK, chosen_TK, plan.potentials
