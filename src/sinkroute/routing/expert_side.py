"""Experts choose tokens: each takes the best of its column, so that loads are equal and tokens get what they get."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkroute._uncompiled import uncompiled

__all__ = ["take_best_tokens"]


@uncompiled  # how many experts the most wanted token gets is known from the data only
def take_best_tokens(
    values_TE: Tensor, per_token: float, token_mask: Tensor | None, least_width: int
) -> tuple[Tensor, Tensor]:
    """Each expert takes the T·c/E real tokens with the largest values in its column.

    Args:
        values_TE: (T, E), finite where the token is real.
        per_token: c, experts that a token gets on average. Together the experts take ⌊T_real · c⌋ tokens, E at least;
            where they cannot take equally many, those take one more whose next token has the largest value.
        token_mask: (T,) bool, True for real tokens.
        least_width: least K' of what is returned.

    Returns:
        `experts_TK` (T, K') int64, a token's experts by descending value, filled up with experts that did not take it,
        and `chosen_TK` bool, which are which. K' is the largest number of experts that took the same token.

    >>> experts_TK, chosen_TK = take_best_tokens(torch.tensor([[3.0, 2.0], [1.0, 0.0], [2.0, 1.0]]), 1.4, None, 1)
    >>> experts_TK.tolist(), chosen_TK.tolist()
    ([[0, 1], [0, 1], [0, 1]], [[True, True], [False, False], [True, True]])
    """
    tokens, experts = values_TE.shape
    real = tokens if token_mask is None else int(token_mask.sum())
    capacity, more = divmod(max(math.floor(real * per_token + 1e-9), experts), experts)
    capacity, more = (capacity, more) if capacity < real else (real, 0)
    if token_mask is not None:
        values_TE = values_TE.masked_fill(~token_mask[:, None], -math.inf)
    best_CE, taken_CE = torch.topk(values_TE, min(capacity + 1, tokens), dim=0)
    chosen_TE = torch.zeros_like(values_TE, dtype=torch.bool).scatter_(0, taken_CE[:capacity], True)
    if more:
        lucky_M = torch.topk(best_CE[capacity], more).indices
        chosen_TE[taken_CE[capacity, lucky_M], lucky_M] = True
    width = max(least_width, int(chosen_TE.sum(1).max()) if tokens else 0)
    experts_TK = torch.topk(values_TE.masked_fill(~chosen_TE, -math.inf), width, dim=1).indices
    return experts_TK, chosen_TE.gather(1, experts_TK)
