"""How many tokens an expert takes in a training pass, and which places go without their expert beyond that.

Of T real tokens with K places each, over E experts, an expert takes at most

    C = ⌈c · K · T / E⌉

(`get_capacity` of Megatron-Core, of K · T choices; for K = 1 the expert capacity of the Switch Transformer, Fedus et
al., arXiv 2101.03961; GShard, arXiv 2006.16668, bounds experts likewise). Of padding nothing is counted, in which this
differs from Megatron-Core. An expert keeps the tokens that give it the largest weights, as by Megatron-Core's default,
`moe_token_drop_policy="probs"`; of equal weights those that come first. Position alone, Megatron-Core's other policy,
would drop what stands at the end of a batch however much it wants its expert.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MILLION", "millionths", "places", "within_capacity"]

# A capacity is counted in millionths: finer than anyone sets it, and c · K · T stays far below 2^63.
MILLION = 1_000_000


def millionths(capacity: float) -> int:
    """A capacity as a whole number of millionths: in floats 1.1 · 10 is above 11, and would give one place more.

    Raises:
        TypeError: it is no number.
        ValueError: it is not a finite number of at least a millionth.

    >>> millionths(1.1)
    1100000
    """
    if isinstance(capacity, bool) or not isinstance(capacity, (int, float)):
        raise TypeError(f"capacity must be a number or None, got {capacity!r}; 1.25 gives experts a quarter to spare")
    if not (math.isfinite(capacity) and capacity >= 1 / MILLION):
        raise ValueError(
            f"capacity must be a finite number above 0, got {capacity}; 1 is an expert's even share of the tokens, "
            "None drops nothing"
        )
    return round(capacity * MILLION)


def places(capacity: int, tokens: int | Tensor, num_experts: int, top_k: int) -> int | Tensor:
    """C of a capacity in millionths and so many real tokens: an int, or 0-d int64 where they are counted on a device.

    >>> places(1_250_000, 10, num_experts=4, top_k=1), places(1_100_000, 10, num_experts=2, top_k=2)
    (4, 11)
    """
    return -(-(tokens * (capacity * top_k)) // (MILLION * num_experts))


def within_capacity(
    experts_TK: Tensor, weights_TK: Tensor, places: int | Tensor, num_experts: int, chosen_TK: Tensor | None = None
) -> Tensor:
    """(T, K) bool: the places that their expert takes, at most `places` an expert, largest weights first.

    No device is waited for.

    Args:
        experts_TK: (T, K) int64 in [0, num_experts).
        weights_TK: (T, K), any float dtype.
        places: C, an int or 0-d int64.
        num_experts: E.
        chosen_TK: (T, K) bool, False at places that are no choice: they take no place, and are False in the result.

    >>> experts, weights = torch.tensor([[0, 1], [0, 2], [0, 1]]), torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.6, 0.4]])
    >>> within_capacity(experts, weights, 2, num_experts=3).tolist()  # the first of the two with 0.6 has the place
    [[True, True], [True, True], [False, True]]
    """
    expert_R = experts_TK.flatten()
    if chosen_TK is not None:
        expert_R = expert_R.masked_fill(~chosen_TK.flatten(), num_experts)
    # By expert, in it by weight, of equal weights by place: two stable sorts.
    by_weight_R = weights_TK.detach().flatten().sort(descending=True, stable=True).indices
    sorted_R, order_R = expert_R[by_weight_R].sort(stable=True)
    every_X = torch.arange(num_experts + 1, device=expert_R.device)  # and one for what is no choice
    starts_X = torch.searchsorted(sorted_R, every_X)
    rank_R = torch.arange(len(sorted_R), device=expert_R.device) - starts_X[sorted_R]
    kept_R = (rank_R < places) & (sorted_R < num_experts)
    return torch.zeros_like(kept_R).scatter(0, by_weight_R[order_R], kept_R).view(experts_TK.shape)
