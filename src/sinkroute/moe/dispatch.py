"""Tokens to experts and back, dropping none: sort by expert, compute, undo the sort, add up.

Both directions gather, in the backward pass too: each copy of a token has its own row, so nothing is added atomically
and the result is the same to the last bit every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Dispatch", "combine", "dispatch", "plan_dispatch"]


class Dispatch(NamedTuple):
    """The order in which copies of tokens meet the experts.

    Attributes:
        order_R: (R,) int64, which copy (token · K + choice) stands at each place; sorted by expert, tokens in order.
        place_R: (R,) int64, its inverse: the place of each copy.
        ends_E: (E,) int32, where each expert's rows end.
        top_k: K.
    """

    order_R: Tensor
    place_R: Tensor
    ends_E: Tensor
    top_k: int


def plan_dispatch(experts_TK: Tensor, num_experts: int) -> Dispatch:
    """Sort the copies of tokens by their expert. `experts_TK` is (T, K) int64 in [0, num_experts).

    >>> plan_dispatch(torch.tensor([[2, 0], [0, 1]]), num_experts=3).order_R.tolist()
    [1, 2, 3, 0]
    """
    expert_R = experts_TK.flatten()
    sorted_R, order_R = torch.sort(expert_R, stable=True)
    place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    every_E = torch.arange(num_experts, device=expert_R.device)
    ends_E = torch.searchsorted(sorted_R, every_E, right=True, out_int32=True)
    return Dispatch(order_R, place_R, ends_E, experts_TK.shape[1])


def dispatch(x_TD: Tensor, plan: Dispatch) -> Tensor:
    """The rows of (T, D) copied K times and sorted by expert: (R, D)."""
    return _Dispatch.apply(x_TD, plan.order_R, plan.place_R, plan.top_k)


def combine(y_RD: Tensor, weights_TK: Tensor, plan: Dispatch) -> Tensor:
    """The weighted sum of each token's K results: (T, D), in the dtype of `y_RD`."""
    y_TKD = _Combine.apply(y_RD, plan.order_R, plan.place_R).unflatten(0, weights_TK.shape)
    return (y_TKD * weights_TK.to(y_RD.dtype)[..., None]).sum(1)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, place_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place_R)
        ctx.top_k = top_k
        return x_TD[order_R // top_k]

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (place_R,) = ctx.saved_tensors
        return grad_RD[place_R].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, place_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return y_RD[place_R]

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        return grad_RD[order_R], None, None
