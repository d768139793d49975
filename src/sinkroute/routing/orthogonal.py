"""Orthogonal initial values in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["fill_orthogonal"]


@torch.no_grad()
def fill_orthogonal(weight: Tensor, gain: float) -> None:
    """Fill a matrix with orthogonal rows or columns of length `gain`, as `nn.init.orthogonal_` does.

    That one cannot do it in bfloat16, which a model from the meta device may have by the time it gets its values.

    >>> weight = torch.empty(2, 8, dtype=torch.bfloat16)
    >>> fill_orthogonal(weight, gain=0.5)
    >>> bool(((weight.float() @ weight.float().t()) - 0.25 * torch.eye(2)).abs().max() < 0.01)
    True
    """
    precise = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(nn.init.orthogonal_(precise, gain=gain))
