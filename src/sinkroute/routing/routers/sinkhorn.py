"""S-BASE: every training step routed by the transport plan (Clark et al., arXiv 2202.01169, section 4.1).

The plan chooses the experts; the weights are the scores of the logits at those experts, so that the gate learns.
Serving is plain top-k. S-BASE takes top-1; for K > 1 the K largest entries of a plan row are taken, as Megatron-Core
does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from sinkroute._errors import require_numbers
from sinkroute.kernels.operations import uncompiled
from sinkroute.routing.router import CommonOptions, Router
from sinkroute.routing.routes import Routes
from sinkroute.transport import solve

__all__ = ["SinkhornRouter"]


class SinkhornRouter(Router):
    """Experts from the plan on every training step, weights from the scores.

    Args:
        reg: ξ of the transport problem. 1.0, no temperature, is what the public implementations use.
        tol: the relative column error at which the solver stops.
        max_passes: the solver's limit; None: its own.
        common: see `Router`. With `process_group`, the plan is that of all its ranks' tokens.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        reg: float = 1.0,
        tol: float = 1e-4,
        max_passes: int | None = None,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(num_experts, top_k, **common)
        require_numbers(reg=reg)
        if not reg > 0:
            raise ValueError(f"reg must be above 0, got {reg}; 1.0 is the usual value")
        # No tokens: the solver only checks its numbers, now and not at the first step that needs a plan.
        solve(torch.empty(0, num_experts, device="cpu"), reg, tol=tol, max_passes=max_passes)
        self.reg, self.tol, self.max_passes = reg, tol, max_passes

    def withdraw(self, device: torch.device) -> None:
        if not (self.training and self._withdraw_from_plan(device, self.tol, self.max_passes)):
            super().withdraw(device)

    @uncompiled  # the solver's loop ends when the data say so
    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        plan = solve(
            logits_TE.detach(),
            self.reg,
            token_mask=token_mask,
            tol=self.tol,
            max_passes=self.max_passes,
            process_group=self.process_group.group,
        )
        experts_TK = self.choose_in(plan)
        return Routes(
            experts_TK,
            self.weigh(logits_TE, experts_TK),
            branch="sinkhorn",
            plan_error=plan.column_error,
            plan_passes=plan.pass_count,
        )
