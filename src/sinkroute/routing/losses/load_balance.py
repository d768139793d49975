"""The load-balancing loss of the Switch Transformer (Fedus et al., arXiv 2101.03961, eq. 4-6).

    loss = coefficient · E · Σ_j f_j P_j
    f_j  = share of the K·T choices that expert j got
    P_j  = mean score of expert j

It is 1 · coefficient at perfect balance, for any K. f carries no gradient; the loss pushes down the scores of busy
experts.
"""

from __future__ import annotations

from torch import Tensor

from sinkroute.routing.losses.inputs import mean_scores
from sinkroute.routing.scores import Score

__all__ = ["load_balance_loss"]


def load_balance_loss(
    logits_TE: Tensor, load_E: Tensor, token_mask: Tensor | None = None, score: Score = "softmax"
) -> Tensor:
    """E · Σ_j f_j P_j over the real tokens, without coefficient; 0 (with a gradient of 0) if there is no real token.

    Args:
        logits_TE: (T, E) logits.
        load_E: (E,) int64, choices per expert, of these tokens or of a larger batch that they belong to.
        token_mask: (T,) bool, True for real tokens.
        score: "softmax", or "sigmoid" (over the sum of a token's sigmoids, arXiv 2412.19437, eq. 19).

    >>> import torch
    >>> load_balance_loss(torch.zeros(6, 4), torch.tensor([3, 3, 3, 3])).item()
    1.0
    """
    mean_score_E = mean_scores(logits_TE, token_mask, score)
    share_E = load_E.to(mean_score_E.dtype) / load_E.sum().clamp(min=1)
    return logits_TE.shape[1] * (share_E * mean_score_E).sum()
