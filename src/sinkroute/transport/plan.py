"""What `solve` returns: potentials, the scores they belong to, how good they are; the T × E matrix only on demand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sinkroute.transport.passes.topk import topk_rows
from sinkroute.transport.problem import cost_matrix

__all__ = ["Plan"]


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A balanced plan Π_ij = m_i softmax_j((cost_ij + potentials_j) / reg), kept as E potentials.

    Attributes:
        potentials: (E,) float64 (float32 from some methods), mean 0 over the experts with mass; −inf for an expert
            without. At small `reg` float32 potentials would spoil the balance.
        scores: (T, E), as given to `solve`, any floating-point dtype; not a copy. Without gradient unless
            `solve(..., differentiable=True)`.
        cost_name: "linear" or "softmax".
        reg: the entropy weight ξ.
        token_mask: (T,) bool, True = real token, or None.
        token_mass: (T,) mass of each row, or None for 1.
        method: name of the solver that ran.
        column_error: 0-d tensor, largest relative deviation of a column sum from its target at `potentials`; experts
            without mass do not count.
        converged: 0-d bool tensor, `column_error <= tol`.
        pass_count: how often the solver went over the scores; a 0-d tensor where the solver ran on an accelerator.

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
    scores: Tensor
    cost_name: str
    reg: float
    token_mask: Tensor | None
    token_mass: Tensor | None
    method: str
    column_error: Tensor
    converged: Tensor
    pass_count: int | Tensor

    def __repr__(self) -> str:
        tokens, experts = self.scores.shape
        return f"Plan({tokens=}, {experts=}, reg={self.reg}, method={self.method!r}, passes={self.passes})"

    @property
    def passes(self) -> int:
        """How often the solver went over the scores. Waits for an accelerator if the solver ran on one."""
        return int(self.pass_count)

    @property
    def cost(self) -> Tensor:
        """C (T, E) in float32 or float64: the scores or their row softmax, made anew at each call."""
        return cost_matrix(self.scores, self.cost_name, self.token_mask)

    def matrix(self) -> Tensor:
        """The plan Π, (T, E): rows sum to the token's mass, 1 for real tokens unless told, 0 for masked ones.

        Columns sum to `Σ token_mass · expert_mass / Σ expert_mass` within `column_error`, over all ranks.
        """
        matrix_TE = (_above_row_maximum(self.cost, self.potentials) / self.reg).softmax(dim=1)
        return self._times_mass(matrix_TE)

    def topk(self, k: int, normalise: bool = True) -> tuple[Tensor, Tensor]:
        """The k largest entries of every row: `(weights_TK, experts_TK)`, descending.

        Normalised, row i is `Π_ij / Σ_{j in top k} Π_ij`: of all distributions on k experts the one nearest to
        row i in Kullback–Leibler divergence (arXiv 2511.08972). Order and weights come from (cost + potentials) / reg,
        so they are right even where entries of the plan underflow to 0, and the T × E matrix is not made.

        Args:
            k: experts per token, 1 to E.
            normalise: True for weights that sum to 1, False for the entries of the plan.

        Returns:
            Weights (T, K) in float32 (float64 for float64 scores), 0 for masked tokens, and expert indices (T, K)
            int64, always valid. A forbidden expert is only chosen where a token has fewer than k others, with weight 0.

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
        experts = self.scores.shape[1]
        if not 1 <= k <= experts:
            raise ValueError(f"k must be 1 to {experts}, the number of experts, got {k}")
        if self.potentials.requires_grad or self.scores.requires_grad:
            return self._topk_with_gradient(k, normalise)
        return topk_rows(
            self.scores, self.cost_name, self.token_mask, self.token_mass, self.potentials, self.reg, k, normalise
        )

    def _topk_with_gradient(self, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        above_TE = _above_row_maximum(self.cost, self.potentials)
        # Order before the division by reg: after it distinct entries may underflow to ties.
        top_TK, experts_TK = above_TE.topk(k, dim=1)
        if not normalise:
            return self._times_mass((above_TE / self.reg).softmax(dim=1)).gather(1, experts_TK), experts_TK
        weights_TK = (top_TK / self.reg).softmax(dim=1)
        has_mass_T = self.token_mask if self.token_mass is None else self.token_mass > 0
        return weights_TK if has_mass_T is None else torch.where(has_mass_T[:, None], weights_TK, 0), experts_TK

    def _times_mass(self, rows: Tensor) -> Tensor:
        if self.token_mass is not None:
            return rows * self.token_mass[:, None]
        return rows if self.token_mask is None else rows.masked_fill(~self.token_mask[:, None], 0)


def _above_row_maximum(cost_TE: Tensor, potentials_E: Tensor) -> Tensor:
    """(C + g) minus its row maximum, ≤ 0, in the cost's dtype, to the last digit even where C and g are large.

    What the sum C + g loses to rounding is recovered (Knuth's TwoSum) and added back when the maximum is off.
    """
    coarse_E = potentials_E.to(cost_TE.dtype)
    rest_E = (potentials_E.detach() - coarse_E.detach()).nan_to_num(0).to(cost_TE.dtype)
    sum_TE = cost_TE + coarse_E
    with torch.no_grad():
        added_TE = sum_TE - cost_TE
        lost_TE = (cost_TE - (sum_TE - added_TE)) + (coarse_E - added_TE)
        lost_TE = torch.where(lost_TE.isfinite(), lost_TE, 0) + rest_E
        above_TE = (sum_TE - sum_TE.amax(dim=1, keepdim=True)) + lost_TE
    if not sum_TE.requires_grad:
        return above_TE
    # The value of the one and the gradient of the other; softmax does not see what the maximum would add to it.
    return above_TE + torch.where(sum_TE.isfinite(), sum_TE - sum_TE.detach(), 0)
