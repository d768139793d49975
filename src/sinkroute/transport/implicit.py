"""The gradient of the potentials by implicit differentiation: no unrolling, no stored iterations.

At the solution the column sums s_j(g, C) = Σ_i m_i p_ij equal the targets. With p_i = softmax((C_i + g) / ξ),

    ∂s_j / ∂g_l  = (1/ξ) L_jl,      L = Lap(Pᵀ diag(m) P)
    ds_j from dC = (1/ξ) Σ_i m_i p_ij (dC_ij − Σ_l p_il dC_il)

since rows of P sum to 1; Lap(A) has −A_jl off the diagonal and rows that sum to 0. Keeping s fixed gives
L dg = −ξ ds, so an upstream gradient v of g, with L w = v, becomes

    ∂loss / ∂C_ij = −m_i p_ij (w_j − Σ_l p_il w_l).

On implicit differentiation of Sinkhorn see Luise et al., *Differential Properties of Sinkhorn Approximation for
Learning with Wasserstein Distance* (2018).

L is the Laplacian of a network in which experts are joined by the tokens they share, and w are the voltages when
currents v, of sum 0, are fed into it. So the gradient cannot explode, however weak the joints: what token i adds for
experts j and l, m_i p_ij p_il (w_j − w_l), is its part of the current between them, and no current exceeds what is fed
in, Σ |v_j| / 2. But weak joints make w large and leave its differences small, so all of this is done in float64, which
neither autocast nor a lower precision of float32 products touches.

An upstream gradient that touches K entries of a row only, such as that of the top-k weights, reaches v through these
entries alone; the plan is never made: both loops go over chunks of rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sinkroute.transport.problem import Problem

__all__ = ["potentials_of_logits"]

# From each expert this fraction of its column sum leaks to ground. It keeps w finite where experts share less than that
# with all others; they get the gradient of experts that share nothing.
LEAK = {torch.float64: 1e-12, torch.float32: 1e-6}


def potentials_of_logits(logits_TE: Tensor, potentials_E: Tensor, problem: Problem) -> Tensor:
    """The solved potentials (E,), unchanged in value, now a differentiable function of the logits (T, E).

    Keeps the logits and E numbers for backward, which solves one E × E system in float64. It can be differentiated
    again, at the price of T × E temporaries. With `problem.reduce`, backward is a collective of all ranks, takes the
    loss to be the sum over the ranks, and cannot be differentiated again (NotImplementedError).
    """
    result_E: Tensor = _Potentials.apply(logits_TE, potentials_E, problem)  # type: ignore[no-untyped-call]
    return result_E


class _Potentials(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits_TE: Tensor, solved_E: Tensor, problem: Problem) -> Tensor:
        return solved_E.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Problem], output: Tensor) -> None:
        logits_TE, _, problem = inputs
        # By autograd, not by the problem: so it notices a change in place, and checkpointing can drop the logits.
        ctx.save_for_backward(logits_TE, output, problem.token_mask, problem.token_mass)
        ctx.problem = replace(problem, logits_TE=logits_TE.new_empty(0, 0), token_mask=None, token_mass=None)

    @staticmethod
    def backward(ctx: Any, upstream_E: Tensor) -> tuple[Tensor, None, None]:
        # Operations that autograd knows, on saved tensors that remember where they come from: a second derivative
        # needs nothing else, as the potentials lead back to this very function.
        logits_TE, potentials_E, token_mask, token_mass = ctx.saved_tensors
        problem = replace(ctx.problem, logits_TE=logits_TE, token_mask=token_mask, token_mass=token_mass)
        if torch.is_grad_enabled() and problem.reduce is not None:
            raise NotImplementedError(
                "a plan from solve(..., differentiable=True) over several ranks has no second derivative, as the sum "
                "over the ranks is not differentiable; call backward without create_graph"
            )
        return _gradient_of_logits(problem, potentials_E, upstream_E), None, None


def _gradient_of_logits(problem: Problem, potentials_E: Tensor, upstream_E: Tensor) -> Tensor:
    experts, wide = problem.logits_TE.shape[1], problem.target_E.dtype
    shared_EE = torch.zeros(experts, experts, dtype=wide, device=potentials_E.device)
    for part in problem.parts():
        _, p_RE, plan_RE = _rows(problem, potentials_E, part)
        shared_EE = shared_EE + p_RE.T @ plan_RE  # not in place: under vmap the zeros are one matrix, these are many
    # One collective for both.
    sums_FE = problem.over_ranks(torch.cat([shared_EE, upstream_E.to(wide)[None]]))
    # Potentials have mean 0 over the experts with mass; the others have p = 0, so that their w does not matter.
    v_E = torch.where(problem.positive_E, sums_FE[-1], 0)
    w_E = _voltages(sums_FE[:-1], v_E - v_E.sum() / problem.positive_E.sum())
    # Like w, not like the logits: where many gradients are asked for at once, w is many.
    gradient_TE = w_E.new_empty(problem.logits_TE.shape, dtype=problem.logits_TE.dtype)
    for part in problem.parts():
        cost_RE, p_RE, plan_RE = _rows(problem, potentials_E, part)
        gradient_RE = plan_RE * ((p_RE @ w_E)[:, None] - w_E)
        if problem.cost == "softmax":
            share_RE = cost_RE.clamp(min=0)  # a forbidden expert has cost −inf, a share of 0
            gradient_RE = share_RE * (gradient_RE - (share_RE * gradient_RE).sum(dim=1, keepdim=True))
        gradient_TE[part] = gradient_RE.to(gradient_TE.dtype)
    return gradient_TE


def _rows(problem: Problem, potentials_E: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows, (R, E) float64: of C, of P, and of diag(m) P."""
    cost_RE = problem.cost_TE(part).to(problem.target_E.dtype)
    p_RE = (cost_RE + potentials_E).div_(problem.reg).softmax(dim=1)
    if problem.token_mass is not None:
        return cost_RE, p_RE, p_RE * problem.token_mass[part, None]
    return cost_RE, p_RE, p_RE if problem.token_mask is None else p_RE.masked_fill(~problem.token_mask[part, None], 0)


def _voltages(shared_EE: Tensor, currents_E: Tensor) -> Tensor:
    """w (E,) with Lap(shared) w = currents, up to a constant and to what leaks; currents sum to 0."""
    sums_E = shared_EE.sum(dim=1)  # the column sums of the plan, as its rows sum to 1
    diagonal_E = torch.where(sums_E > 0, (1 + LEAK[sums_E.dtype]) * sums_E, 1)
    # Cholesky is as exact as if the matrix had been scaled to a diagonal of 1 (Demmel 1989).
    factor_EE, _ = torch.linalg.cholesky_ex(diagonal_E.diag() - shared_EE)
    return torch.cholesky_solve(currents_E[:, None], factor_EE)[:, 0]
