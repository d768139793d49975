"""Experts choose tokens: each takes the best of its column, so that loads are equal and tokens get what they get."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkroute.kernels.normal import normal_like
from sinkroute.kernels.operations import uncompiled
from sinkroute.kernels.storage import holds_values
from sinkroute.kernels.topk import largest, topk
from sinkroute.routing.beside import checked_mask

__all__ = ["take_best_tokens"]


@uncompiled  # how many experts the most wanted token gets is known from the data only
def take_best_tokens(
    values_TE: Tensor, per_token: float, token_mask: Tensor | None, least_width: int, ties: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each expert takes the T·c/E real tokens with the largest values in its column; of equal ones the earlier.

    Args:
        values_TE: (T, E), finite where the token is real.
        per_token: c, experts that a token gets on average. Together the experts take ⌊T_real · c⌋ tokens, E at least;
            where they cannot take equally many, those take one more whose next token has the largest value.
        token_mask: (T,) bool, True for real tokens.
        least_width: least K' of what is returned.
        ties: 0-d int64 on the CPU: equal tokens come in an order that is drawn for each expert, by this seed.

    Returns:
        `experts_TK` (T, K') int64, a token's experts by descending value, filled up with experts that did not take it,
        and `chosen_TK` bool, which are which. K' is the largest number of experts that took the same token.

    >>> experts_TK, chosen_TK = take_best_tokens(torch.tensor([[3.0, 2.0], [1.0, 0.0], [2.0, 1.0]]), 1.4, None, 1)
    >>> experts_TK.tolist(), chosen_TK.tolist()
    ([[0, 1], [0, 1], [0, 1]], [[True, True], [False, False], [True, True]])
    """
    if not holds_values(values_TE):
        raise NotImplementedError(
            f"values_TE are a {type(values_TE).__name__} on {values_TE.device} whose numbers cannot be looked at "
            "(vmap, a tracer, meta or fake tensors), but routes where experts choose have as many columns as the "
            "most wanted token has experts; route outside of it, or in eval()"
        )
    tokens, experts = values_TE.shape
    token_mask = checked_mask(token_mask, values_TE, (tokens,))
    real = tokens if token_mask is None else int(token_mask.sum())
    capacity, more = divmod(max(math.floor(real * per_token + 1e-9), experts), experts)
    capacity, more = (capacity, more) if capacity < real else (real, 0)
    if token_mask is not None:
        values_TE = values_TE.masked_fill(~token_mask[:, None], -math.inf)
    ties_ET = None if ties is None else normal_like(values_TE, ties).t().contiguous()
    best_EC, taken_EC = largest(values_TE.t().contiguous(), min(capacity + 1, tokens), ties_ET)
    best_CE, taken_CE = best_EC.t(), taken_EC.t()
    chosen_TE = torch.zeros_like(values_TE, dtype=torch.bool).scatter_(0, taken_CE[:capacity], True)
    if more:
        lucky_M = topk(best_CE[capacity][None], more)[0]
        chosen_TE[taken_CE[capacity, lucky_M], lucky_M] = True
    width = max(least_width, int(chosen_TE.sum(1).max()) if tokens else 0)
    experts_TK = topk(values_TE.masked_fill(~chosen_TE, -math.inf), width)
    return experts_TK, chosen_TE.gather(1, experts_TK)
