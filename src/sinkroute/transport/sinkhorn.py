"""Sinkhorn–Knopp in the log domain, eliminated to the E expert potentials: the textbook method, kept as a reference.

One pass over the cost, from potentials g:

    f_i     = log Σ_j exp((C_ij + g_j) / ξ)                     the row constraint, met exactly
    log s_j = log Σ_i m_i exp((C_ij + g_j) / ξ − f_i)           the column sums of the plan at g
    g_j    ← g_j + ξ (log t_j − log s_j)                        unless max |s_j / t_j − 1| ≤ tol

The same iterates as `u = 1 ⊘ K v`, `v = t ⊘ Kᵀu` (arXiv 2511.08972) with g = ξ log v, without their overflow: the row
maximum is subtracted before the division by ξ, so no exponent is positive. The error falls linearly, by a factor that
nears 1 as ξ → 0. Source of the elimination: Cuturi, *Sinkhorn Distances* (2013), and Peyré & Cuturi, *Computational
Optimal Transport* (2019), section 4.4. `dual` solves the same problem in far fewer passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute.transport.problem import Problem, Solution, refuse_bad_logits

__all__ = ["sinkhorn"]

MAX_PASSES = 1000
# Looking at the error makes the host wait for an accelerator, so there it is looked at every 8 passes only.
CHECK_EVERY_CPU, CHECK_EVERY_ACCELERATOR = 1, 8


def sinkhorn(problem: Problem, *, tol: float, max_passes: int | None, init_E: Tensor | None) -> Solution:
    """Log-domain Sinkhorn–Knopp, at most 1000 passes by default; returns the best potentials seen.

    The column error is that of the returned potentials. On an accelerator convergence is checked every 8 passes.
    """
    on_cpu = problem.logits_TE.device.type == "cpu"
    if on_cpu:
        refuse_bad_logits(problem)
    check_every = CHECK_EVERY_CPU if on_cpu else CHECK_EVERY_ACCELERATOR
    limit = MAX_PASSES if max_passes is None else max_passes
    cost_TE = problem.cost_TE()
    log_target_E = problem.target_E.log().to(cost_TE)
    start_E = torch.zeros_like(log_target_E) if init_E is None else init_E.to(cost_TE)
    potentials_E = best_E = problem.centre(start_E.masked_fill(~problem.positive_E, -torch.inf))
    best_error = problem.target_E.new_full((), torch.inf)
    for passes in range(1, limit + 1):
        log_sums_E = column_log_sums(problem, cost_TE, potentials_E)
        error = problem.column_error(log_sums_E)
        better = error < best_error
        best_E, best_error = torch.where(better, potentials_E, best_E), torch.where(better, error, best_error)
        if passes % check_every == 0 and bool(best_error <= tol):
            break
        step_E = torch.where(problem.positive_E, log_target_E - log_sums_E.to(cost_TE), 0)
        potentials_E = problem.centre(potentials_E + problem.reg * step_E)
    return Solution(best_E, best_error, passes)


def column_log_sums(problem: Problem, cost_TE: Tensor, potentials_E: Tensor) -> Tensor:
    """Logarithms of the column sums of the plan at these potentials, (E,) float64, over all ranks; never NaN."""
    log_plan_TE = cost_TE + potentials_E
    log_plan_TE -= log_plan_TE.amax(dim=1, keepdim=True)
    log_plan_TE /= problem.reg
    # A finite floor: at a tiny ξ a whole column may sit at −inf, and its potential would leap to +inf.
    log_plan_TE.clamp_(min=torch.finfo(log_plan_TE.dtype).min / 4)
    log_plan_TE -= log_plan_TE.logsumexp(dim=1, keepdim=True)
    if problem.token_mass is not None:
        log_plan_TE += problem.token_mass.log()[:, None]
    elif problem.token_mask is not None:
        log_plan_TE.masked_fill_(~problem.token_mask[:, None], -torch.inf)
    log_sums_E = log_plan_TE.logsumexp(dim=0).to(problem.target_E.dtype)
    return log_sums_E if problem.reduce is None else problem.reduce(log_sums_E.exp()).log()
