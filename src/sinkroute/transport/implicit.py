"""The gradient of the potentials by implicit differentiation: no unrolling, no stored iterations.

At the solution the column sums s_j(g, C) = Σ_i Π_ij equal the targets. With Π_ij = softmax_j((C_ij + g_j) / ξ),

    ∂s_j / ∂g_l  = (1/ξ) (δ_jl Σ_i Π_ij − (ΠᵀΠ)_jl) = (1/ξ) L_jl,      L = Lap(ΠᵀΠ)
    ds_j from dC = (1/ξ) Σ_i Π_ij (dC_ij − Σ_l Π_il dC_il)

since rows of Π sum to 1; Lap(A) has −A_jl off the diagonal and rows that sum to 0. Keeping s fixed gives
L dg = −ξ ds, so an upstream gradient v of g, with L w = v, becomes

    ∂loss / ∂C_ij = −Π_ij (w_j − (Π w)_i).

L is symmetric positive semidefinite. Its null space holds the constant vector: potentials have mean 0, so v is
projected to sum 0, and the gradient does not see a constant in w. On implicit differentiation of Sinkhorn see
Luise et al., *Differential Properties of Sinkhorn Approximation for Learning with Wasserstein Distance* (2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sinkroute.transport.plan import plan_matrix

__all__ = ["potentials_of_cost"]


def potentials_of_cost(
    cost_TE: Tensor, potentials_E: Tensor, reg: float, token_mask: Tensor | None, positive_E: Tensor
) -> Tensor:
    """The solved potentials (E,), unchanged in value, now a differentiable function of the cost (T, E).

    Backward solves one E × E system in float64 and keeps only the cost between forward and backward; a second
    derivative is refused with torch's `once_differentiable` error.
    """
    return _Potentials.apply(cost_TE, potentials_E, reg, token_mask, positive_E)


class _Potentials(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cost_TE: Tensor, potentials_E: Tensor, reg: float, token_mask: Tensor | None, positive_E: Tensor
    ) -> Tensor:
        ctx.save_for_backward(cost_TE, potentials_E, token_mask, positive_E)
        ctx.reg = reg
        return potentials_E.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_E: Tensor) -> tuple[Tensor, None, None, None, None]:
        cost_TE, potentials_E, token_mask, positive_E = ctx.saved_tensors
        with torch.autocast(cost_TE.device.type, enabled=False):
            plan_TE = plan_matrix(cost_TE, potentials_E, ctx.reg, token_mask)
            w_E = _solve_laplacian(plan_TE.T @ plan_TE, upstream_E, positive_E)
            return -plan_TE * (w_E - (plan_TE @ w_E)[:, None]), None, None, None, None


def _solve_laplacian(weights_EE: Tensor, upstream_E: Tensor, positive_E: Tensor) -> Tensor:
    """The shortest w with Lap(weights) w = upstream, after the projection of upstream to sum 0."""
    v_E = torch.where(positive_E, upstream_E.double(), 0)
    v_E = torch.where(positive_E, v_E - v_E.sum() / positive_E.sum(), 0)
    laplacian_EE = -weights_EE.double()
    laplacian_EE.fill_diagonal_(0)
    # The diagonal as minus the sum of the rest: no cancellation, the constant vector stays in the null space.
    laplacian_EE -= laplacian_EE.sum(dim=1).diag()
    # A pseudo-inverse, not a solve: experts without mass or without a common token add to the null space.
    return (torch.linalg.pinv(laplacian_EE, rtol=1e-13, hermitian=True) @ v_E).to(upstream_E.dtype)
