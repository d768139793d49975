"""Sinkhorn–Knopp as the paper writes it, kept to show where it fails (arXiv 2511.08972).

    K = exp(C / ξ),    u = m ⊘ (K v),    v = t ⊘ (Kᵀ u),    Π = diag(u) K diag(v),    at most 100 iterations

In float32 `exp` overflows at C / ξ ≈ 88.7 and a row of K vanishes below C / ξ ≈ −103: either way u, v and the error
become NaN. `sinkhorn` has the same iterates and no such limit; use that one, or `dual`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute.transport.problem import Problem, Solution, refuse_bad_logits

__all__ = ["naive"]

MAX_PASSES = 100


def naive(problem: Problem, *, tol: float, max_passes: int | None, init_E: Tensor | None) -> Solution:
    """Sinkhorn–Knopp on exp(C / ξ), at most 100 passes by default; NaN potentials and error where that overflows."""
    if problem.logits_TE.device.type == "cpu":
        refuse_bad_logits(problem)
    limit = MAX_PASSES if max_passes is None else max_passes
    kernel_TE = (problem.cost_TE() / problem.reg).exp()
    target_E = problem.target_E.to(kernel_TE)
    start_E = torch.zeros_like(target_E) if init_E is None else problem.centre(init_E).to(kernel_TE)
    v_E = torch.where(problem.positive_E, (start_E / problem.reg).exp(), 0)
    for passes in range(1, limit + 1):
        u_T = 1 / (kernel_TE @ v_E)
        if problem.token_mask is not None:
            u_T = torch.where(problem.token_mask, u_T if problem.token_mass is None else problem.token_mass * u_T, 0)
        kernel_u_E = problem.over_ranks(kernel_TE.T @ u_T)
        error = problem.column_error((v_E * kernel_u_E).log().to(problem.target_E))
        if passes == limit or bool(error <= tol):
            break
        v_E = target_E / kernel_u_E
    return Solution(problem.centre(problem.reg * v_E.log()), error, passes)
