"""Reductions that leave padding out."""

from __future__ import annotations

from torch import Tensor

from sinkroute.routing.beside import checked_mask

__all__ = ["mean_over_tokens"]


def mean_over_tokens(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """The mean of (T, ...) values over the real tokens; 0 if there is none.

    Raises:
        TypeError, ValueError: the mask is no bool tensor (T,).
    """
    token_mask = checked_mask(token_mask, values, values.shape[:1])
    if token_mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    mask = token_mask.view(-1, *[1] * (values.ndim - 1))
    return (values * mask).sum(0) / token_mask.sum().clamp(min=1)
