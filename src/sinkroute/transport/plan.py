"""What `solve` returns: potentials, the cost they belong to, how good they are; the T × E matrix only on demand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Plan", "plan_matrix"]


def plan_matrix(cost_TE: Tensor, potentials_E: Tensor, reg: float, token_mask: Tensor | None) -> Tensor:
    """Π_ij = softmax_j((C_ij + g_j) / ξ), (T, E), rows of masked tokens 0; differentiable in cost and potentials."""
    shifted_TE = cost_TE + potentials_E
    # The maximum goes before the division: (C + g) / ξ may overflow, the difference may only underflow.
    matrix_TE = ((shifted_TE - shifted_TE.detach().amax(dim=1, keepdim=True)) / reg).softmax(dim=1)
    return matrix_TE if token_mask is None else matrix_TE.masked_fill(~token_mask[:, None], 0)


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A balanced plan Π_ij = softmax_j((cost_ij + potentials_j) / reg), kept as E potentials.

    Attributes:
        potentials: (E,) float32 or float64, mean 0 over the experts with mass; −inf for an expert without.
        cost: (T, E), same dtype: the scores or their row softmax, masked rows from scores of 0. May share memory with
            the scores. Without gradient unless `solve(..., differentiable=True)`.
        reg: the entropy weight ξ.
        token_mask: (T,) bool, True = real token, or None.
        method: name of the solver that ran.
        column_error: 0-d tensor, largest relative deviation of a column sum from its target at `potentials`; experts
            without mass do not count.
        converged: 0-d bool tensor, `column_error <= tol`.
        passes: how often the solver went over the cost.

    Example:
        >>> import torch
        >>> from sinkroute.transport import solve
        >>> plan = solve(torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 1.0], [3.0, 2.0]]), reg=0.5, method="sinkhorn")
        >>> plan
        Plan(tokens=4, experts=2, reg=0.5, method='sinkhorn', passes=11)
        >>> plan.matrix().sum(dim=0).round(decimals=3).tolist()
        [2.0, 2.0]
    """

    potentials: Tensor
    cost: Tensor
    reg: float
    token_mask: Tensor | None
    method: str
    column_error: Tensor
    converged: Tensor
    passes: int

    def __repr__(self) -> str:
        tokens, experts = self.cost.shape
        return f"Plan({tokens=}, {experts=}, reg={self.reg}, method={self.method!r}, passes={self.passes})"

    def matrix(self) -> Tensor:
        """The plan Π, (T, E): rows of real tokens sum to 1 and those of masked tokens to 0.

        Columns sum to `T_real · expert_mass / expert_mass.sum()` within `column_error`, over all ranks.
        """
        return plan_matrix(self.cost, self.potentials, self.reg, self.token_mask)

    def topk(self, k: int, normalise: bool = True) -> tuple[Tensor, Tensor]:
        """The k largest entries of every row: `(weights_TK, experts_TK)`, descending.

        Normalised, row i is `Π_ij / Σ_{j in top k} Π_ij`: of all distributions on k experts the one nearest to
        row i in Kullback–Leibler divergence (arXiv 2511.08972). Order and weights come from (cost + potentials) / reg,
        so they are right even where entries of the plan underflow to 0, and the T × E matrix is not made.

        Args:
            k: experts per token, 1 to E.
            normalise: True for weights that sum to 1, False for the entries of the plan.

        Returns:
            Weights (T, K) in the plan's dtype, 0 for masked tokens, and expert indices (T, K) int64, always valid.

        Raises:
            ValueError: k is not in 1 to E.

        Example:
            >>> import torch
            >>> from sinkroute.transport import solve
            >>> plan = solve(torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 1.0], [3.0, 2.0]]), reg=0.5)
            >>> weights_TK, experts_TK = plan.topk(1)
            >>> experts_TK.flatten().tolist(), weights_TK.flatten().tolist()
            ([0, 0, 1, 1], [1.0, 1.0, 1.0, 1.0])
        """
        experts = self.cost.shape[1]
        if not 1 <= k <= experts:
            raise ValueError(f"k must be 1 to {experts}, the number of experts, got {k}")
        # Order by cost + potentials: after the division by reg distinct entries may underflow to ties.
        top_TK, experts_TK = (self.cost + self.potentials).topk(k, dim=1)
        if not normalise:
            return self.matrix().gather(1, experts_TK), experts_TK
        weights_TK = ((top_TK - top_TK[:, :1].detach()) / self.reg).softmax(dim=1)
        if self.token_mask is not None:
            weights_TK = torch.where(self.token_mask[:, None], weights_TK, 0)
        return weights_TK, experts_TK
