"""How evenly experts are used: numbers from counts, for any method.

All take loads: counts of routed tokens, (E,) or (..., E) integers or floats, and reduce the last dimension.
An idle layer (all counts 0) is balanced by definition: nothing was unfair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["coefficient_of_variation", "dead_experts", "load_entropy", "load_metrics", "max_violation"]


def _relative(load: Tensor) -> Tensor:
    """Load over mean load: 1 everywhere when balanced."""
    load = load.double()
    mean = load.mean(-1, keepdim=True)
    return torch.where(mean > 0, load / mean, torch.ones_like(load))


def max_violation(load: Tensor) -> Tensor:
    """MaxVio (arXiv 2408.15664): (max load − mean load) / mean load; 0 is balanced, E − 1 is collapse.

    >>> max_violation(torch.tensor([6, 2, 2, 2])).item()
    1.0
    """
    return _relative(load).amax(-1) - 1


def load_entropy(load: Tensor) -> Tensor:
    """Entropy of the shares, over ln E: 1 is balanced, 0 is one expert. With one expert: 1.

    >>> load_entropy(torch.tensor([5, 5, 0, 0])).item()
    0.5
    """
    experts = load.shape[-1]
    if experts == 1:
        return torch.ones(load.shape[:-1], dtype=torch.float64, device=load.device)
    share = _relative(load) / experts
    return -torch.special.xlogy(share, share).sum(-1) / math.log(experts)


def coefficient_of_variation(load: Tensor) -> Tensor:
    """Standard deviation over mean of the loads; 0 is balanced.

    >>> coefficient_of_variation(torch.tensor([3, 1])).item()
    0.5
    """
    return _relative(load).std(-1, unbiased=False)


def dead_experts(load: Tensor, threshold: float = 0.01) -> Tensor:
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
