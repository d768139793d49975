"""What routers share that route a whole batch by a transport plan, on some steps or on all."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkroute.kernels.operations import uncompiled
from sinkroute.routing.ledger import talking
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.transport import Plan, solve
from sinkroute.transport.over_ranks import refuse_to_ranks
from sinkroute.transport.ranks import gather_over_ranks, sum_over_ranks
from sinkroute.transport.solve import leave

__all__ = ["PlanRouter"]


class PlanRouter(Router):
    """A router that solves for plans. With `process_group`, a plan is that of all its ranks' tokens."""

    # Whether `choose_by_plan` talks to the ranks of a plan too, by `balanced_topk`.
    balances_choice = False

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        reg: float | None = option(
            None, "ξ, the entropy regularisation", above=0, hint="try 0.5 (ssr-l) or 0.1 (ssr-s)"
        )
        tol: float = option(1e-4, "the relative column error at which the solver stops", above=0)
        max_passes: int | None = option(None, "the solver's limit; None: what the solver has", least=1)

    def plans_now(self) -> bool:
        """Whether a pass in this mode and step solves for a plan."""
        raise NotImplementedError

    @uncompiled
    def solve_plan(
        self, cost_TE: Tensor, token_mask: Tensor | None, init_E: Tensor | None = None, differentiable: bool = False
    ) -> Plan:
        """The plan of the tokens of all ranks of `process_group`, for a cost that is linear to the solver."""
        with talking(self):
            return solve(
                cost_TE,
                self.reg,
                token_mask=token_mask,
                tol=self.tol,
                max_passes=self.max_passes,
                init=init_E,
                differentiable=differentiable,
                process_group=self.ranks.plan.group,
            )

    def choose_by_plan(self, plan: Plan, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The choice of a plan: the K largest entries of each row, in its best groups, unless the method has another.

        Returns:
            (T, K') int64 experts; (T, K') bool, False for places that count nowhere, or None: all are chosen; and (E,)
            what added to the cost makes its top-k balanced, which some methods remember.
        """
        if self.top_groups < self.groups:
            experts_TK = self.choose(plan.matrix().detach())  # groups are judged by the sums of entries
        elif self.tie_seed() is None:
            experts_TK = plan.topk(self.top_k).experts
        else:
            # Before the division by reg, after which distinct entries may underflow to ties.
            experts_TK = self.choose((plan.cost + plan.potentials).detach())
        return experts_TK, None, plan.potentials

    def withdraw(self, device: torch.device) -> None:
        group = self.ranks.plan.group if self.plans_now() else None
        if group is not None:
            nothing, error = torch.empty(0, self.num_experts, device=device), sys.exc_info()[1]
            leave(nothing, sum_over_ranks(group), error, tol=self.tol, max_passes=self.max_passes)
            if device.type != "cpu" and self.balances_choice:
                refuse_to_ranks(nothing, gather_over_ranks(group), error)
            if device.type == "cpu" or self.balances_choice:  # the other ranks know now, and call no more
                return
        super().withdraw(device)
