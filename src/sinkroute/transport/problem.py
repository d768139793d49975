"""The transport problem: what is asked of a solver, and what the solver gives back.

A solver sees a `Problem`: the logits (T, E) as they came, the name of the cost C, the entropy weight ξ, the mass m_i of
every row and the column sums to reach,

    target_j = Σ m_i · mass_j / Σ mass,

over all ranks. It gives back a `Solution`: potentials g and how far the column sums of
`m_i softmax_j((C_ij + g_j) / ξ)` are from the targets at exactly these potentials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sinkroute._errors import NonFiniteLogits
from sinkroute.kernels.rows import Rows

__all__ = ["Problem", "Reduction", "Solution", "refuse_bad_logits"]

Reduction = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks that share the tokens; the same bits on every rank."""


class Solution(NamedTuple):
    """What a solver returns: potentials (E,), the 0-d column error at these potentials, the passes over the cost."""

    potentials_E: Tensor
    column_error: Tensor
    passes: int | Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem(Rows):
    """A checked transport problem: `Rows`, and what is asked of their plan; `make_problem` builds it.

    Attributes:
        reg: ξ > 0, representable in the working dtype.
        target_E: (E,) float64 column sums to reach, over all ranks.
        positive_E: (E,) bool, the experts with mass; the others get potential −inf.
        empty: no token has mass, on any rank.
        reduce: the sum over the ranks that share the tokens; None for this process alone.
    """

    reg: float
    target_E: Tensor
    positive_E: Tensor
    empty: bool = False
    reduce: Reduction | None = None

    def centre(self, potentials_E: Tensor) -> Tensor:
        """Shift potentials to mean 0 over the experts with mass: the plan does not depend on their level."""
        share_E = torch.where(self.positive_E, potentials_E, 0) / self.positive_E.sum()
        return potentials_E - share_E.sum()

    def column_error(self, log_sums_E: Tensor) -> Tensor:
        """Largest |column sum / target − 1| over experts with mass, 0-d, from the logarithms of the column sums."""
        deviation_E = torch.expm1(log_sums_E - self.target_E.log())
        return torch.where(self.positive_E, deviation_E, 0).abs().amax()

    def over_ranks(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks."""
        return x if self.reduce is None else self.reduce(x)


def refuse_bad_logits(problem: Problem) -> None:
    """Raise `NonFiniteLogits`, naming the first logit that no plan can be made of, if there is one.

    NaN and +inf are refused, and rows that are −inf wherever an expert has mass. −inf alone is a forbidden expert. With
    `problem.reduce` a collective: all ranks raise if one does. Not called for accelerators: there bad logits give a
    plan that has not converged.
    """
    error = _bad_logits(problem)
    if problem.reduce is not None:
        # All ranks or none: whoever goes on would wait for the others. Each can look, and its error names the first.
        bad = torch.tensor(float(error is not None), dtype=problem.target_E.dtype, device=problem.target_E.device)
        if bool(problem.reduce(bad)) and error is None:
            error = NonFiniteLogits(
                "logits on another rank are NaN, +inf or −inf throughout; its error names the first"
            )
    if error is not None:
        raise error


def _bad_logits(problem: Problem) -> NonFiniteLogits | None:
    logits_TE = problem.logits_TE
    real_T1 = torch.ones_like(logits_TE[:, :1], dtype=torch.bool)
    if problem.token_mask is not None:
        real_T1 = problem.token_mask[:, None]
    bad = ((logits_TE.isnan() | (logits_TE == math.inf)) & real_T1).nonzero()
    if len(bad):
        token, expert = bad[0].tolist()
        return NonFiniteLogits(
            f"logits_TE[{token}, {expert}] is {logits_TE[token, expert].item()}; logits of real tokens must be finite, "
            "or −inf for an expert that the token must not have: mask padding with token_mask, or look for divergence "
            "upstream (lower the learning rate, clip gradients)"
        )
    allowed_TE = (logits_TE > -math.inf) & problem.positive_E
    forbidden = (~allowed_TE.any(dim=1, keepdim=True) & real_T1).nonzero()
    if len(forbidden):
        return NonFiniteLogits(
            f"all logits of token {forbidden[0, 0].item()} are −inf, or its other experts have an expert_mass of 0, so "
            "that no expert is left for it; leave at least one, or mask the token with token_mask"
        )
    return None
