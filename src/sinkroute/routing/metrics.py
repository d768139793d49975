"""How evenly experts are used, how sure the gate is, and how much routes change: pure functions, for any method.

Those of loads take counts of routed tokens, (E,) or (..., E) integers or floats, and reduce the last dimension.
An idle layer (all counts 0) is balanced by definition: nothing was unfair.
Those that compare two choices take expert indices (..., T, K) of the same tokens, no expert twice in a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkroute.routing.scores import Score, log_scores

__all__ = [
    "DEAD",
    "coefficient_of_variation",
    "dead_experts",
    "load_entropy",
    "load_metrics",
    "max_violation",
    "router_entropy",
    "routing_fluctuation",
    "saturation",
]


DEAD = 0.01
"""Of a fair share: an expert with less is dead, everywhere in sinkroute."""


def _relative(load: Tensor) -> Tensor:
    """Load over mean load: 1 everywhere when balanced."""
    load = load.double()
    total = load.sum(-1, keepdim=True)
    # Rounded once, in the division: the quotient of counts cannot come out above E. That of load and mean can.
    return torch.where(total > 0, load * load.shape[-1] / total, torch.ones_like(load))


def max_violation(load: Tensor) -> Tensor:
    """MaxVio (arXiv 2408.15664): (max load − mean load) / mean load; 0 is balanced, E − 1 is collapse.

    >>> max_violation(torch.tensor([6, 2, 2, 2])).item()
    1.0
    """
    return (_relative(load).amax(-1) - 1).clamp(0, load.shape[-1] - 1)


def load_entropy(load: Tensor) -> Tensor:
    """Entropy of the shares, over ln E: 1 is balanced, 0 is one expert. With one expert: 1.

    >>> load_entropy(torch.tensor([5, 5, 0, 0])).item()
    0.5
    """
    experts = load.shape[-1]
    if experts == 1:
        return torch.ones(load.shape[:-1], dtype=torch.float64, device=load.device)
    share = _relative(load) / experts
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy.div(math.log(experts)).clamp(0, 1)


def coefficient_of_variation(load: Tensor) -> Tensor:
    """Standard deviation over mean of the loads; 0 is balanced, √(E − 1) is collapse.

    >>> coefficient_of_variation(torch.tensor([3, 1])).item()
    0.5
    """
    return _relative(load).std(-1, unbiased=False).clamp(max=math.sqrt(load.shape[-1] - 1))


def dead_experts(load: Tensor, threshold: float = DEAD) -> Tensor:
    """How many experts got less than `threshold` of the uniform load (int64).

    >>> dead_experts(torch.tensor([1000, 1000, 1000, 5])).item()
    1
    """
    return (_relative(load) < threshold).sum(-1)


def load_metrics(load: Tensor) -> dict[str, float]:
    """All of the above for the counts of one layer (E,), as plain numbers.

    >>> load_metrics(torch.tensor([4, 4]))
    {'max_vio': 0.0, 'entropy': 1.0, 'cv': 0.0, 'dead': 0}
    """
    return {
        "max_vio": max_violation(load).item(),
        "entropy": load_entropy(load).item(),
        "cv": coefficient_of_variation(load).item(),
        "dead": int(dead_experts(load)),
    }


def router_entropy(logits_TE: Tensor, score: Score = "softmax") -> Tensor:
    """H(p) of each token in nats, (T,): ln E is undecided, 0 is sure.

    Args:
        logits_TE: (..., E) float.
        score: p is the scores over a token's sum of them.

    >>> [round(value, 4) for value in router_entropy(torch.tensor([[0.0, 0.0], [9.0, -9.0]])).tolist()]
    [0.6931, 0.0]
    """
    p_TE = torch.softmax(log_scores(logits_TE, score), dim=-1)
    entropy_T: Tensor = torch.special.entr(p_TE).sum(-1)
    return entropy_T


def routing_fluctuation(experts_a: Tensor, experts_b: Tensor) -> Tensor:
    """1 − |A ∩ B| / |A ∪ B| of the tokens' expert sets in two checkpoints, mean over tokens, float64.

    0: nothing moved (so it is without tokens); 1: no token kept an expert.

    Args:
        experts_a: (..., T, K) integers, no expert twice in a row.
        experts_b: (..., T, K'), the same tokens.

    Raises:
        ValueError: other tokens.

    >>> routing_fluctuation(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 4]])).item()  # 0 and 1 − 1/3
    0.33333333333333337
    """
    both_T = _overlap(experts_a, experts_b)
    return _mean_over_tokens(1 - both_T / (experts_a.shape[-1] + experts_b.shape[-1] - both_T))


def saturation(experts: Tensor, final_experts: Tensor) -> Tensor:
    """|A ∩ B| / K of the tokens' experts at some step with those at the end, mean over tokens, float64.

    Router saturation of OLMoE (arXiv 2409.02060). 1: routed as at the end (so it is without tokens);
    chance is K/E.

    Args:
        experts: (..., T, K) integers, no expert twice in a row.
        final_experts: the same shape, of the same tokens.

    Raises:
        ValueError: shapes that differ.

    >>> saturation(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 1]])).item()
    0.75
    """
    both_T = _overlap(experts, final_experts)
    if experts.shape != final_experts.shape:
        raise ValueError(
            f"experts {tuple(experts.shape)} and final_experts {tuple(final_experts.shape)} must have the same K; "
            "overlap is relative to it"
        )
    return 1 - _mean_over_tokens(1 - both_T / experts.shape[-1])


def _overlap(experts_a: Tensor, experts_b: Tensor) -> Tensor:
    """(..., T) float64: how many experts are in both sets."""
    if experts_a.ndim < 2 or experts_a.shape[:-1] != experts_b.shape[:-1]:
        raise ValueError(
            f"expert indices must be (..., T, K) of the same tokens, got {tuple(experts_a.shape)} and "
            f"{tuple(experts_b.shape)}; route the same probe batch both times"
        )
    return (experts_a[..., :, None] == experts_b[..., None, :]).sum((-1, -2)).double()


def _mean_over_tokens(change_T: Tensor) -> Tensor:
    """Mean of the last dimension; 0 without tokens: nothing changed."""
    return change_T.sum(-1) / max(change_T.shape[-1], 1)
