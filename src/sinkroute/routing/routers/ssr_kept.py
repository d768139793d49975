"""What members of the SSR family share that remember the potentials of a plan: one vector for a whole step.

The plans of a step (one per micro-batch and rank, unless a process group solves one for all) give potentials each; what
is remembered is their mean, weighted by tokens. Where plans are of one rank and there are others, it is what balances
the tokens of all ranks, found when the step is over (`StepTokens`). So all ranks remember the same.

A step has a plan by the draw, and while nothing has been kept yet: so the first training step has one, whatever p is,
unless p is 0 there. A resumed run has kept something and goes on by the draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sinkroute.routing.card import Card
from sinkroute.routing.firing import ProbabilityLike
from sinkroute.routing.ledger import talking
from sinkroute.routing.noise import NoiseLike
from sinkroute.routing.options import option, with_default
from sinkroute.routing.routers.ssr import PlanWeights, SSRRouter
from sinkroute.routing.routers.ssr_b import choose_balanced
from sinkroute.routing.routes import Routes
from sinkroute.routing.state import RouterState
from sinkroute.routing.step_tokens import StepTokens, plans_apart, potentials_of_all
from sinkroute.transport import Plan, balanced_topk, solve

__all__ = ["SSRKeptRouter"]

Balance = Literal["plan", "load"]


class SSRKeptRouter(SSRRouter):
    """SSR-L that keeps the potentials of its plans when a step is over. Without groups.

    Attributes:
        state: holds `bias_E` (E,) float32.
    """

    card = Card("yes", "yes", "top-k; on a share p of the steps a plan and a balanced choice")
    cost = "linear"
    keeps_groups = False
    _kept = False  # whether `state.plans` was found above 0

    @dataclass(frozen=True, kw_only=True)
    class Options(SSRRouter.Options):
        probability: ProbabilityLike = with_default(SSRRouter.Options, "probability", 0.08)
        noise: NoiseLike = with_default(SSRRouter.Options, "noise", 0.0)
        weights: PlanWeights = with_default(SSRRouter.Options, "weights", "scores")
        rate: float = option(
            1.0,
            "how far to move to the new potentials; 1 takes them as they are",
            above=0,
            most=1,
            hint="1 takes new potentials as they are",
        )
        balance: Balance = option(
            "load",
            'what a Sinkhorn step balances: the "load" after the top-k, by the bias that balanced_topk finds, or the '
            '"plan"\'s mass, which leaves loads that are less even',
        )
        balance_tol: float = option(
            0.01, 'MaxVio on Sinkhorn steps with balance="load", at most', least=0, hint="0.01 is 1 %"
        )

    state: RouterState

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(num_experts, top_k, **options)
        self.step_tokens = StepTokens()
        self.balances_choice = self.balance == "load"

    def state_values(self) -> dict[str, Tensor]:
        # `plans`: steps whose potentials were kept.
        plans = torch.tensor(0.0, device="cpu")
        return super().state_values() | {"bias_E": torch.zeros(self.num_experts, device="cpu"), "plans": plans}

    def state_sums(self) -> dict[str, int]:
        return {"potentials": self.num_experts, "tokens": 1}

    def prepare_step(self) -> None:
        super().prepare_step()
        if self.probability_now > 0 and not self._has_kept():
            self.sinkhorn_now = True

    def _has_kept(self) -> bool:
        """Whether any plan was kept. A device is asked once a step until one is."""
        if not self._kept or self.state.ended < 0:  # a state that was reset has not ended a step
            self._kept = not self.state.plans.is_meta and float(self.state.plans) > 0
        return self._kept

    def forget(self) -> None:
        super().forget()
        self._kept = False
        if "step_tokens" in vars(self):  # not while it is made
            self.step_tokens = StepTokens()

    def choose_by_plan(self, plan: Plan, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.training and self.clock.told and plans_apart(self.ranks):
            self.step_tokens.note(plan.logits, token_mask)
        if self.balance == "load":
            with talking(self):
                return choose_balanced(plan, self.top_k, self.balance_tol, token_mask, self.ranks.plan.group)
        return super().choose_by_plan(plan, token_mask)

    def step_sums(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> dict[str, Tensor]:
        sums = super().step_sums(logits_TE, routes, token_mask)
        if routes.potentials is None:
            return sums
        if token_mask is None:
            tokens = routes.potentials.new_full((1,), len(logits_TE), dtype=torch.float64)
        else:
            tokens = token_mask.sum().double().view(1)
        return sums | {"potentials": routes.potentials.double() * tokens, "tokens": tokens}

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        super().finish_step(load_E, sums)
        potentials_E = sums["potentials"] / sums["tokens"].clamp(min=1)
        if plans_apart(self.ranks) and self._had_plans(sums["tokens"]):
            potentials_E = potentials_of_all(self.step_tokens, self.ranks, potentials_E, self._find)
        # A solve that failed (scores that are not finite, on a device that cannot say so) must not be remembered.
        known = (sums["tokens"] > 0).all() & potentials_E.isfinite().all()
        bias_E = self.state.bias_E
        bias_E.copy_(torch.where(known, torch.lerp(bias_E.double(), potentials_E, self.rate), bias_E))
        self.state.plans.add_(known)

    def _had_plans(self, tokens: Tensor) -> bool:
        """Whether a rank had a plan in the step that is over; all ranks say the same."""
        if tokens.device.type == "cpu" or self.draw == "layer":
            return bool(tokens > 0)
        return self.sinkhorn_now  # an accelerator is not asked

    def _find(self, cost_NE: Tensor, **whole: Any) -> Tensor:
        if self.balance == "load":
            return balanced_topk(cost_NE, self.top_k, self.balance_tol, **whole).bias
        return solve(cost_NE, self.reg, tol=self.tol, max_passes=self.max_passes, **whole).potentials

    def potentials(self) -> tuple[Tensor, ...]:
        return (self.state.bias_E,)
