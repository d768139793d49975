"""What `solve` returns: potentials, the logits they belong to, how good they are; the T × E matrix only on demand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sinkroute.kernels.plan_topk import plan_topk
from sinkroute.kernels.rows import Rows, working_dtype
from sinkroute.transport.checks import check_k

__all__ = ["Plan", "TopK"]


class TopK(NamedTuple):
    """The best experts of every token, descending: weights (T, K) in float32 or float64, experts (T, K) int64.

    >>> import sinkroute, torch
    >>> weights_TK, experts_TK = sinkroute.solve(torch.eye(4), reg=0.1).topk(1)
    >>> experts_TK.flatten()
    tensor([0, 1, 2, 3])
    """

    weights: Tensor
    experts: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A balanced plan Π_ij = m_i softmax_j((cost_ij + potentials_j) / reg), kept as E potentials.

    Attributes:
        potentials: (E,) float64 (float32 from some methods), mean 0 over the experts with mass; −inf for an expert
            without. At small `reg` float32 potentials would spoil the balance.
        logits: (T, E), as given to `solve`, any floating-point dtype; not a copy. Without gradient unless
            `solve(..., differentiable=True)`.
        cost_name: "linear" or "softmax".
        reg: the entropy weight ξ.
        token_mask: (T,) bool, True = token with mass, or None when all are.
        token_mass: (T,) mass of each row, or None for 1.
        method: name of the solver that ran.
        column_error: 0-d tensor, largest relative deviation of a column sum from its target at `potentials`; experts
            without mass do not count.
        converged: 0-d bool tensor, `column_error <= tol`.
        pass_count: how often the solver went over the logits; a 0-d tensor where the solver ran on an accelerator.

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
    logits: Tensor
    cost_name: str
    reg: float
    token_mask: Tensor | None
    token_mass: Tensor | None
    method: str
    column_error: Tensor
    converged: Tensor
    pass_count: int | Tensor

    def __repr__(self) -> str:
        tokens, experts = self.logits.shape
        return f"Plan({tokens=}, {experts=}, reg={self.reg}, method={self.method!r}, passes={self.passes})"

    @property
    def passes(self) -> int:
        """How often the solver went over the logits. Waits for an accelerator if the solver ran on one."""
        return int(self.pass_count)

    @property
    def cost(self) -> Tensor:
        """C (T, E) in float32 or float64: the logits or their row softmax, made anew at each call."""
        return Rows(self.logits, self.cost_name, self.token_mask).cost_TE()

    def matrix(self) -> Tensor:
        """The plan Π, (T, E): rows sum to the token's mass, 1 for real tokens unless told, 0 for masked ones.

        Columns sum to `Σ token_mass · expert_mass / Σ expert_mass` within `column_error`, over all ranks.
        """
        # In the dtype of the potentials: at small reg the shift must not be rounded to float32.
        above_TE = self.cost.to(torch.promote_types(self.logits.dtype, self.potentials.dtype)) + self.potentials
        above_TE = above_TE - above_TE.detach().amax(dim=1, keepdim=True)
        matrix_TE = (above_TE / self.reg).to(working_dtype(self.logits.dtype)).softmax(dim=1)
        if self.token_mass is not None:
            return matrix_TE * self.token_mass[:, None]
        return matrix_TE if self.token_mask is None else matrix_TE.masked_fill(~self.token_mask[:, None], 0)

    def topk(self, k: int, normalise: bool = True) -> TopK:
        """The k largest entries of every row, `(weights, experts)`: descending, of equal ones the lower first.

        Normalised, row i is `Π_ij / Σ_{j in top k} Π_ij`: of all distributions on k experts the one nearest to
        row i in Kullback–Leibler divergence (arXiv 2511.08972). Order and weights come from (cost + potentials) / reg,
        so they are right even where entries of the plan underflow to 0, and the T × E matrix is not made.

        Args:
            k: experts per token, 1 to E.
            normalise: True for weights that sum to 1, False for the entries of the plan.

        Returns:
            A named tuple of weights (T, K) in float32 (float64 for float64 logits), 0 for masked tokens, and experts
            (T, K) int64, 0 to k − 1 for masked tokens. A forbidden expert is only chosen where a token has fewer than k
            others, with weight 0.

        Raises:
            TypeError: k is no int.
            ValueError: k is not in 1 to E.

        Example:
            >>> import torch
            >>> from sinkroute.transport import solve
            >>> plan = solve(torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 1.0], [3.0, 2.0]]), reg=0.5)
            >>> top = plan.topk(1)
            >>> top.experts.flatten().tolist(), top.weights.flatten().tolist()
            ([0, 0, 1, 1], [1.0, 1.0, 1.0, 1.0])
        """
        check_k(k, self.logits.shape[1])
        rows = Rows(self.logits.detach(), self.cost_name, self.token_mask, self.token_mass)
        weights_TK, experts_TK = plan_topk(rows, self.potentials.detach(), self.reg, k, normalise)
        if self.potentials.requires_grad or self.logits.requires_grad:
            weights_TK = self.weigh(experts_TK, normalise)
        return TopK(weights_TK, experts_TK)

    def weigh(self, experts_TK: Tensor, normalise: bool = True) -> Tensor:
        """The entries of the plan at experts (T, K) that were chosen otherwise, as `topk` weighs its own.

        >>> import torch
        >>> from sinkroute.transport import solve
        >>> plan = solve(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), reg=1.0)
        >>> plan.weigh(torch.tensor([[0], [0]]), normalise=False).flatten() > 0.5
        tensor([ True, False])
        """
        if not normalise:
            return self.matrix().gather(1, experts_TK)
        # The linear cost is looked up where the logits are: K numbers of a row are kept for backward, not E.
        cost_TE = self.logits if self.cost_name == "linear" else self.cost
        top_TK = cost_TE.gather(1, experts_TK).to(self.potentials.dtype)
        if self.token_mask is not None:
            # NaN in a masked row must not reach any arithmetic: 0 · NaN is NaN, in gradients too.
            top_TK = torch.where(self.token_mask[:, None], top_TK, 0)
        top_TK = top_TK + self.potentials[experts_TK]
        top_TK = top_TK - top_TK.detach().amax(dim=1, keepdim=True)
        weights_TK = (top_TK / self.reg).to(working_dtype(self.logits.dtype)).softmax(dim=1)
        return weights_TK if self.token_mask is None else torch.where(self.token_mask[:, None], weights_TK, 0)
