"""The router z-loss of ST-MoE (Zoph et al., arXiv 2202.08906, eq. 5): it keeps logits small, and does not balance.

loss = coefficient · mean_i (logsumexp_j z_ij)²
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute.routing.masked import mean_over_tokens

__all__ = ["z_loss"]


def z_loss(logits_TE: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """The mean over real tokens of the squared log-sum-exp of (T, E) logits; 0 if there is no real token.

    >>> round(z_loss(torch.zeros(5, 4)).item(), 4)  # (ln 4)²
    1.9218
    """
    return mean_over_tokens(torch.logsumexp(logits_TE, dim=-1) ** 2, token_mask)
