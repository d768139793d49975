"""S-BASE: every training step routed by the transport plan (Clark et al., arXiv 2202.01169, section 4.1).

The plan chooses the experts; the weights are the scores of the logits at those experts, so that the gate learns.
Serving is plain top-k. S-BASE takes top-1; for K > 1 the K largest entries of a plan row are taken, as Megatron-Core
does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sinkroute.kernels.operations import uncompiled
from sinkroute.routing.card import Card
from sinkroute.routing.options import option
from sinkroute.routing.routers.plan import PlanRouter
from sinkroute.routing.routes import Routes

__all__ = ["SinkhornRouter"]


class SinkhornRouter(PlanRouter):
    """Experts from the plan on every training step, weights from the scores."""

    card = Card("partly", "partly", "a plan")

    @dataclass(frozen=True, kw_only=True)
    class Options(PlanRouter.Options):
        reg: float = option(
            1.0,
            "ξ, the entropy regularisation. 1.0, no temperature, is what the public implementations use",
            above=0,
            hint="1.0 is the usual value",
        )

    def plans_now(self) -> bool:
        return self.training

    @uncompiled  # the solver's loop ends when the data say so
    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        plan = self.solve_plan(logits_TE.detach(), token_mask)
        experts_TK, _, _ = self.choose_by_plan(plan, token_mask)
        return Routes(
            experts_TK,
            self.weigh(logits_TE, experts_TK),
            branch="sinkhorn",
            plan_error=plan.column_error,
            plan_passes=plan.pass_count,
        )
