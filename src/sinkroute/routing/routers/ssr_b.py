"""SSR-B: Sinkhorn steps whose loads are balanced in whole tokens.

The top-k of a balanced plan is not balanced. Here the plan of arXiv 2511.08972 weighs the experts, but they are chosen
by `balanced_topk`: the assignment with the largest sum of scores in which every load is within `balance_tol` of the
mean. The steps between, and serving, are as in SSR. Ours; not in the paper.
"""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import Unpack

from sinkroute._errors import require_numbers
from sinkroute.routing.routers.ssr import Cost, PlanChoice, SSROptions, SSRRouter, read_cost
from sinkroute.transport import Plan, balanced_topk

__all__ = ["SSRBalancedRouter", "check_balance_tol", "choose_balanced"]


def check_balance_tol(balance_tol: float) -> float:
    """`balance_tol`, if it can be one.

    Raises:
        TypeError, ValueError: it is no number, negative or not finite.
    """
    require_numbers(balance_tol=balance_tol)
    if not (balance_tol >= 0 and math.isfinite(balance_tol)):
        raise ValueError(f"balance_tol must be a finite number of 0 or more, got {balance_tol}; 0.01 is 1 %")
    return balance_tol


def choose_balanced(plan: Plan, top_k: int, tol: float, token_mask: Tensor | None) -> PlanChoice:
    """Experts with balanced loads for the cost of a plan, best first."""
    scores_TE = plan.logits.detach()
    experts_TK, bias_E = balanced_topk(scores_TE, top_k, tol, token_mask=token_mask, init=plan.potentials.detach())
    experts_TK = experts_TK.sort(1).values  # so that of equal ones the lower expert comes first
    chosen_TK = (scores_TE + plan.potentials.detach()).gather(1, experts_TK)
    order_TK = chosen_TK.argsort(dim=1, descending=True, stable=True)
    return PlanChoice(experts_TK.gather(1, order_TK), None, bias_E)


class SSRBalancedRouter(SSRRouter):
    """SSR with loads that are balanced after the top-k on every Sinkhorn step.

    Args:
        cost: `"linear"`, or `"softmax"`, for which the choice takes several times as long.
        balance_tol: MaxVio on Sinkhorn steps, at most (or what rounding to whole tokens leaves).
        options: see `SSRRouter`. Without groups: a token's experts may be anywhere.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("ssr-b", num_experts=4, top_k=1, probability=1.0, noise=0)
    >>> routes = router(torch.randn(400, 4) + torch.tensor([3.0, 0, 0, 0]))
    >>> bool(routes.load.max() <= 101)
    True
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        cost: Cost = "linear",
        balance_tol: float = 0.01,
        **options: Unpack[SSROptions],
    ) -> None:
        self.cost, self.balance_tol = read_cost(cost), check_balance_tol(balance_tol)
        super().__init__(num_experts, top_k, **options)
        self.refuse_groups()

    def choose_on_plan(self, plan: Plan, token_mask: Tensor | None) -> PlanChoice:
        return choose_balanced(plan, self.top_k, self.balance_tol, token_mask)
