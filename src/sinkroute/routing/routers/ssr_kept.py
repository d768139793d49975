"""What members of the SSR family share that remember the potentials of a plan: one vector for a whole step.

The plans of a step (one per micro-batch and rank, unless a process group solves one for all) give potentials each; what
is remembered is their mean, weighted by tokens, so that all ranks remember the same.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Unpack

from sinkroute._errors import require_numbers, unknown_name
from sinkroute.routing.routers.ssr import PlanChoice, SSROptions, SSRRouter
from sinkroute.routing.routers.ssr_b import check_balance_tol, choose_balanced
from sinkroute.routing.routes import Routes
from sinkroute.transport import Plan

__all__ = ["SSRKeptOptions", "SSRKeptRouter"]

Balance = Literal["plan", "load"]


class SSRKeptOptions(SSROptions, total=False):
    """The keyword options of routers that keep potentials; see `SSRKeptRouter`."""

    rate: float
    balance: Balance
    balance_tol: float


class SSRKeptRouter(SSRRouter):
    """SSR-L that does something with the potentials of a step's plans when the step is over: `keep`.

    Args:
        rate: how far to move to the new potentials; 1 takes them as they are.
        balance: what a Sinkhorn step balances: the `"plan"`'s mass, or the `"load"` after the top-k, by the bias that
            `balanced_topk` finds.
        balance_tol: MaxVio on Sinkhorn steps with `balance="load"`, at most.
        options: see `SSRRouter`. Without groups.
    """

    cost = "linear"

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        rate: float = 1.0,
        balance: Balance = "plan",
        balance_tol: float = 0.01,
        **options: Unpack[SSROptions],
    ) -> None:
        require_numbers(rate=rate)
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {rate}; 1 takes new potentials as they are")
        if balance not in get_args(Balance):
            raise unknown_name("balance", balance, get_args(Balance))
        self.rate, self.balance, self.balance_tol = rate, balance, check_balance_tol(balance_tol)
        super().__init__(num_experts, top_k, **options)
        self.refuse_groups()

    def keep(self, potentials_E: Tensor, known: Tensor) -> None:
        """Remember (E,) float64 potentials; `known` is a 0-d bool tensor, False if the step had no plan."""
        raise NotImplementedError

    def state_sums(self) -> dict[str, int]:
        return {"potentials": self.num_experts, "tokens": 1}

    def choose_on_plan(self, plan: Plan, token_mask: Tensor | None) -> PlanChoice:
        if self.balance == "load":
            return choose_balanced(plan, self.top_k, self.balance_tol, token_mask)
        return super().choose_on_plan(plan, token_mask)

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
        # A solve that failed (scores that are not finite, on a device that cannot say so) must not be remembered.
        self.keep(potentials_E, (sums["tokens"] > 0).all() & potentials_E.isfinite().all())
