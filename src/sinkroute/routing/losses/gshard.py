"""The load-balancing loss of GShard (Lepikhin et al., arXiv 2006.16668, algorithm 1): the load of first choices.

    loss = coefficient · E · Σ_j f_j P_j
    f_j  = share of the T tokens whose first choice is expert j
    P_j  = mean score of expert j

The paper's ℓ_aux is the mean of f_j P_j over the experts, 1/E² of this; its code, and everybody's after it, has this
scale, where perfect balance costs 1 · coefficient. f carries no gradient. With one expert per token it is the loss of
the Switch Transformer; with more, second choices may be as uneven as they like.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute.routing.beside import checked_mask
from sinkroute.routing.losses.load_balance import load_balance_loss
from sinkroute.routing.scores import Score

__all__ = ["gshard_loss"]


def gshard_loss(
    logits_TE: Tensor,
    experts_TK: Tensor,
    token_mask: Tensor | None = None,
    score: Score = "softmax",
    chosen_TK: Tensor | None = None,
) -> Tensor:
    """E · Σ_j f_j P_j over the real tokens, without coefficient; 0 (with a gradient of 0) if there is no real token.

    Args:
        logits_TE: (T, E) logits.
        experts_TK: (T, K) int64, a token's experts, its first choice first.
        token_mask: (T,) bool, True for real tokens.
        score: "softmax", or "sigmoid" (over the sum of a token's sigmoids).
        chosen_TK: (T, K) bool, which places are choices of real tokens; None: all of real tokens.

    >>> gshard_loss(torch.zeros(2, 4), torch.tensor([[0, 1], [0, 2]])).item()  # even scores, whatever the load
    1.0
    """
    token_mask = checked_mask(token_mask, logits_TE, logits_TE.shape[:1])
    first_T = experts_TK[:, 0]
    if chosen_TK is not None:
        counted_T = chosen_TK[:, 0].long()
    else:
        counted_T = torch.ones_like(first_T) if token_mask is None else token_mask.long()
    first_load_E = counted_T.new_zeros(logits_TE.shape[1]).scatter_add(0, first_T, counted_T)
    return load_balance_loss(logits_TE, first_load_E, token_mask, score)
