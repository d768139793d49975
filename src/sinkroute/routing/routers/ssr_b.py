"""SSR-B: Sinkhorn steps whose loads are balanced in whole tokens.

The top-k of a balanced plan is not balanced. Here the plan of arXiv 2511.08972 weighs the experts, but they are chosen
by `balanced_topk`: the assignment with the largest sum of logits in which every load is within `balance_tol` of the
mean. The steps between, and serving, are as in SSR. Ours; not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from sinkroute.routing.card import Card
from sinkroute.routing.ledger import talking
from sinkroute.routing.options import option
from sinkroute.routing.routers.ssr import Cost, SSRRouter
from sinkroute.routing.scores import best_first
from sinkroute.transport import Plan, balanced_topk

__all__ = ["SSRBalancedRouter", "choose_balanced"]


def choose_balanced(
    plan: Plan, top_k: int, tol: float, token_mask: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, None, Tensor]:
    """Experts with balanced loads for the cost of a plan of these ranks, best first; see `choose_by_plan`."""
    cost_TE, potentials_E = plan.logits.detach(), plan.potentials.detach()
    experts_TK, bias_E = balanced_topk(
        cost_TE, top_k, tol, token_mask=token_mask, init=potentials_E, process_group=group
    )
    return best_first(experts_TK, cost_TE + potentials_E), None, bias_E


class SSRBalancedRouter(SSRRouter):
    """SSR with loads that are balanced after the top-k on every Sinkhorn step. Without groups.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("ssr-b", num_experts=4, top_k=1, probability=1.0, noise=0)
    >>> routes = router(torch.randn(400, 4) + torch.tensor([3.0, 0, 0, 0]))
    >>> bool(routes.load.max() <= 101)
    True
    """

    card = Card("plans", "no", "top-k; on a share p of the steps a plan and a balanced choice")
    keeps_groups = False
    balances_choice = True

    @dataclass(frozen=True, kw_only=True)
    class Options(SSRRouter.Options):
        cost: Cost = option("linear", '"linear", or "softmax", for which the choice takes several times as long')
        balance_tol: float = option(
            0.01,
            "MaxVio on Sinkhorn steps, at most (or what rounding to whole tokens leaves)",
            least=0,
            hint="0.01 is 1 %",
        )

    def choose_by_plan(self, plan: Plan, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        with talking(self):
            return choose_balanced(plan, self.top_k, self.balance_tol, token_mask, self.ranks.plan.group)
