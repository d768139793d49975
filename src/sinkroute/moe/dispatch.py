"""Tokens to experts and back: sort by expert, compute, undo the sort, add up.

Both directions gather, in the backward pass too: each copy of a token has its own row, so nothing is added atomically
and the result is the same to the last bit every time. Copies that are no choice (padding, places that a router filled
up, what is beyond a capacity) can be left out; their results are 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkroute.moe.function import apply

__all__ = ["Dispatch", "combine", "dispatch", "plan_dispatch"]


class Dispatch(NamedTuple):
    """The order in which copies of tokens meet the experts.

    Attributes:
        order_R: (R,) int64, which copy (token · K + choice) stands at each place; sorted by expert, tokens in order.
        place_R: (R,) int64, its inverse: the place of each copy. None where some copies have none; R is below T·K then.
        ends_E: (E,) int32, where each expert's rows end.
        top_k: K.
    """

    order_R: Tensor
    place_R: Tensor | None
    ends_E: Tensor
    top_k: int


def plan_dispatch(experts_TK: Tensor, num_experts: int, chosen_TK: Tensor | None = None) -> Dispatch:
    """Sort the copies of tokens by their expert.

    Args:
        experts_TK: (T, K) int64 in [0, num_experts).
        num_experts: E.
        chosen_TK: (T, K) bool, False for copies to leave out. How many rows there are is then known from the data only:
            a device is waited for. None: all copies, R = T·K.

    >>> plan_dispatch(torch.tensor([[2, 0], [0, 1]]), num_experts=3).order_R.tolist()
    [1, 2, 3, 0]
    >>> plan_dispatch(torch.tensor([[2, 0], [0, 1]]), 3, torch.tensor([[True, False], [True, True]])).order_R.tolist()
    [2, 3, 0]
    """
    expert_R = experts_TK.flatten()
    copy_R = None if chosen_TK is None else torch.nonzero(chosen_TK.flatten()).flatten()
    if copy_R is not None:
        expert_R = expert_R[copy_R]
    sorted_R, order_R = torch.sort(expert_R, stable=True)
    every_E = torch.arange(num_experts, device=expert_R.device)
    ends_E = torch.searchsorted(sorted_R, every_E, right=True, out_int32=True)
    if copy_R is not None:
        return Dispatch(copy_R[order_R], None, ends_E, experts_TK.shape[1])
    place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    return Dispatch(order_R, place_R, ends_E, experts_TK.shape[1])


def dispatch(x_TD: Tensor, plan: Dispatch) -> Tensor:
    """The rows of (T, D) copied K times and sorted by expert, without those left out: (R, D)."""
    x_RD: Tensor = apply(_Dispatch, x_TD, plan.order_R, plan.place_R, plan.top_k)
    return x_RD


def combine(y_RD: Tensor, weights_TK: Tensor, plan: Dispatch) -> Tensor:
    """The weighted sum of each token's K results: (T, D), in the dtype of `y_RD`. What was left out counts as 0."""
    # (R, D) → (T·K, D) → (T, K, D)
    copies_RD: Tensor = apply(_Combine, y_RD, plan.order_R, plan.place_R, weights_TK.numel())
    y_TKD: Tensor = copies_RD.unflatten(0, weights_TK.shape)
    # (T, K, D) → (T, D)
    return (y_TKD * weights_TK.to(y_RD.dtype)[..., None]).sum(1)


class _Dispatch(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_TD: Tensor, order_R: Tensor, place_R: Tensor | None, top_k: int) -> Tensor:
        return x_TD[order_R // top_k]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
        x_TD, order_R, place_R, ctx.top_k = inputs
        ctx.save_for_backward(order_R, place_R)
        ctx.tokens = len(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        order_R, place_R = ctx.saved_tensors
        grad = _to_copies(grad_RD, order_R, place_R, ctx.tokens * ctx.top_k)
        return grad.unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y_RD: Tensor, order_R: Tensor, place_R: Tensor | None, copies: int) -> Tensor:
        return _to_copies(y_RD, order_R, place_R, copies)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order_R,) = ctx.saved_tensors
        return grad[order_R], None, None, None


def _to_copies(rows_RD: Tensor, order_R: Tensor, place_R: Tensor | None, copies: int) -> Tensor:
    """Rows sorted by expert, in the order of the copies; 0 for those left out."""
    if place_R is not None:
        return rows_RD[place_R]
    # No two rows are of the same copy: nothing is added, and the order of writing does not matter.
    return rows_RD.new_zeros(copies, rows_RD.shape[1]).index_copy(0, order_R, rows_RD)
