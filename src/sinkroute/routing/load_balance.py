"""The load-balancing loss of the Switch Transformer (Fedus et al., arXiv 2101.03961, eq. 4-6).

    loss = coefficient · E · Σ_j f_j P_j
    f_j  = share of the K·T choices that expert j got
    P_j  = mean softmax score of expert j

It is 1 · coefficient at perfect balance, for any K. f carries no gradient; the loss pushes down the scores of busy
experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkroute._errors import require_numbers
from sinkroute.routing.masked import mean_over_tokens
from sinkroute.routing.router import Router

__all__ = ["LoadBalanceRouter", "load_balance_loss"]


def load_balance_loss(logits_TE: Tensor, load_E: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """E · Σ_j f_j P_j over the real tokens, without coefficient; 0 (with a gradient of 0) if there is no real token.

    Args:
        logits_TE: (T, E) scores.
        load_E: (E,) int64, choices of real tokens per expert.
        token_mask: (T,) bool, True for real tokens.

    >>> load_balance_loss(torch.zeros(6, 4), torch.tensor([3, 3, 3, 3])).item()
    1.0
    """
    mean_score_E = mean_over_tokens(torch.softmax(logits_TE, dim=-1), token_mask)
    share_E = load_E.to(mean_score_E.dtype) / load_E.sum().clamp(min=1)
    return logits_TE.shape[1] * (share_E * mean_score_E).sum()


class LoadBalanceRouter(Router):
    """Top-k with the Switch load-balancing loss, per micro-batch.

    Args:
        coefficient: of the loss; 0.01 is the published value (arXiv 2101.03961, section 2.2).
    """

    def __init__(
        self, num_experts: int, top_k: int, *, coefficient: float = 0.01, norm_topk: bool | None = None
    ) -> None:
        super().__init__(num_experts, top_k, norm_topk=norm_topk)
        require_numbers(coefficient=coefficient)
        if not (coefficient >= 0 and math.isfinite(coefficient)):
            raise ValueError(
                f"coefficient must be a finite number of 0 or more, got {coefficient}; 0.01 is the published value"
            )
        self.coefficient = coefficient

    def auxiliary_loss(self, logits_TE: Tensor, load_E: Tensor, token_mask: Tensor | None) -> Tensor:
        return self.coefficient * load_balance_loss(logits_TE, load_E, token_mask)
