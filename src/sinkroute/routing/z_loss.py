"""The router z-loss of ST-MoE (Zoph et al., arXiv 2202.08906, eq. 5): it keeps logits small, and does not balance.

loss = coefficient · mean_i (logsumexp_j z_ij)²
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkroute._errors import require_numbers
from sinkroute.routing.masked import mean_over_tokens
from sinkroute.routing.router import Router

__all__ = ["ZLossRouter", "z_loss"]


def z_loss(logits_TE: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """The mean over real tokens of the squared log-sum-exp of (T, E) scores; 0 if there is no real token.

    >>> round(z_loss(torch.zeros(5, 4)).item(), 4)  # (ln 4)²
    1.9218
    """
    return mean_over_tokens(torch.logsumexp(logits_TE, dim=-1) ** 2, token_mask)


class ZLossRouter(Router):
    """Top-k with the router z-loss.

    Args:
        coefficient: of the loss; 0.001 is the published value (arXiv 2202.08906, section 3.3).
    """

    def __init__(
        self, num_experts: int, top_k: int, *, coefficient: float = 1e-3, norm_topk: bool | None = None
    ) -> None:
        super().__init__(num_experts, top_k, norm_topk=norm_topk)
        require_numbers(coefficient=coefficient)
        if not (coefficient >= 0 and math.isfinite(coefficient)):
            raise ValueError(
                f"coefficient must be a finite number of 0 or more, got {coefficient}; 0.001 is the published value"
            )
        self.coefficient = coefficient

    def auxiliary_loss(self, logits_TE: Tensor, load_E: Tensor, token_mask: Tensor | None) -> Tensor:
        return self.coefficient * z_loss(logits_TE, token_mask)
