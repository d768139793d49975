"""Sinkhorn–Knopp as the paper writes it, kept to show where it fails (arXiv 2511.08972).

    K = exp(C / ξ),    u = 1 ⊘ (K v),    v = t ⊘ (Kᵀ u),    Π = diag(u) K diag(v),    at most 100 iterations

In float32 `exp` overflows at C / ξ ≈ 88.7 and a row of K vanishes below C / ξ ≈ −103: either way u, v and the error
become NaN. `sinkhorn` has the same iterates and no such limit; use that one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute.transport.problem import Problem, Solution

__all__ = ["naive"]

MAX_PASSES = 100


def naive(problem: Problem, *, tol: float, max_passes: int | None, init_E: Tensor) -> Solution:
    """Sinkhorn–Knopp on exp(C / ξ), at most 100 passes by default; NaN potentials and error where that overflows."""
    limit = MAX_PASSES if max_passes is None else max_passes
    kernel_TE = (problem.cost_TE / problem.reg).exp()
    v_E = (init_E / problem.reg).exp()
    for passes in range(1, limit + 1):
        u_T = 1 / (kernel_TE @ v_E)
        if problem.token_mask is not None:
            u_T = torch.where(problem.token_mask, u_T, 0)
        kernel_u_E = problem.over_ranks(kernel_TE.T @ u_T)
        error = problem.column_error((v_E * kernel_u_E).log())
        if passes == limit or bool(error <= tol):
            break
        v_E = problem.target_E / kernel_u_E
    return Solution(problem.centre(problem.reg * v_E.log()), error, passes)
