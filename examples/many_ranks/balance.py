"""How much imbalance is noise, and what an imbalance costs.

Loads of a balanced router still scatter: with T tokens of which each chooses K of E experts with equal chances, a load
is binomial, and the busiest expert is above the mean. All of it is for tokens that choose independently; those of one
document do not, and scatter more.
"""

from __future__ import annotations

import math
from functools import cache

import torch

import sinkroute


@cache
def normal_maximum(n: int) -> tuple[float, float]:
    """Mean and mean square of the largest of n independent standard normal numbers.

    >>> [round(value, 3) for value in normal_maximum(2)]  # 1/√π and 1
    [0.564, 1.0]
    """
    x = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    log_below = torch.special.log_ndtr(x)
    density = n * torch.exp(-0.5 * x.square() - 0.5 * math.log(2 * math.pi) + (n - 1) * log_below)
    return tuple(torch.trapezoid(density * x**power, x).item() for power in (1, 2))  # type: ignore[return-value]


def chance_max_vio(tokens: int, experts: int, top_k: int) -> float:
    """Expected MaxVio, the busiest expert's load over the mean, minus 1, of T tokens that choose with equal chances.

    With p = K/E, loads over their mean have the variance s² = (1 − p) / (T·p) and the skewness (1 − 2p) / √(T·p·(1−p)).
    They sum to E, which makes them spread by √(E / (E − 1)) around their mean. So

        MaxVio ≈ √(E / (E − 1)) · s · (m₁ + (m₂ − 1) · skewness / 6)

    with the mean m₁ and the mean square m₂ of the largest of E standard normal numbers (Cornish and Fisher).

    >>> round(chance_max_vio(512, 16, 2), 3)
    0.218
    """
    if top_k >= experts:
        return 0.0
    p = top_k / experts
    spread = math.sqrt((1 - p) / (tokens * p))
    skewness = (1 - 2 * p) / math.sqrt(tokens * p * (1 - p))
    mean, square = normal_maximum(experts)
    return math.sqrt(experts / (experts - 1)) * spread * (mean + (square - 1) * skewness / 6)


def simulated_max_vio(tokens: int, experts: int, top_k: int, batches: int, seed: int = 0) -> tuple[float, float]:
    """The same by drawing: mean over batches, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        chosen = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        load = chosen.flatten().bincount(minlength=experts).double()
        found.append(load.max() / load.mean() - 1)
    values = torch.stack(found)
    return values.mean().item(), values.std().item() / math.sqrt(batches)


def routed_max_vio(tokens: int, experts: int, top_k: int, steps: int, router: str = "ssr-dual") -> float:
    """MaxVio of a step, mean over the second half of a training, on tokens that are independent of each other.

    Logits are normal, with a favour for each expert that is as large as what tokens differ by. Nothing else moves, so
    that what a router leaves beyond chance is its doing.
    """
    generator = torch.Generator().manual_seed(0)
    favour_E = torch.randn(experts, generator=generator)
    made = sinkroute.create_router(router, num_experts=experts, top_k=top_k)
    with sinkroute.LoadMonitor(made) as monitor:
        for step in range(steps):
            if step == steps // 2:
                monitor.reset()
            sinkroute.set_step(made, step)
            made(torch.randn(tokens, experts, generator=generator) + favour_E)
    return float(monitor.metrics()["router"]["max_vio"])


def rank_excess(max_vio: float, experts: int, ep: int) -> tuple[float, float, float]:
    """By how much the busiest expert-parallel rank is above the mean, for the MaxVio v of experts.

    A rank holds n = E / EP experts and is waited for until it has done all of them:

    - v · (E − n) / (n · (E − 1)) where one expert is busy and all others are alike;
    - v · m(EP) / (m(E) · √n) where loads are independent, with the mean m of the largest of so many normal numbers;
    - v where all experts of one rank are as busy, and EP − 1 at most.

    >>> [round(value, 3) for value in rank_excess(0.3, 64, 64)]  # an expert a rank
    [0.3, 0.3, 0.3]
    >>> [round(value, 3) for value in rank_excess(0.3, 64, 8)]
    [0.033, 0.064, 0.3]
    >>> rank_excess(0.3, 64, 1)  # all experts on each rank: there is nothing to wait for
    (0.0, 0.0, 0.0)
    """
    if ep == 1:
        return 0.0, 0.0, 0.0
    held = experts // ep
    one = max_vio * (experts - held) / (held * (experts - 1))
    independent = max_vio * normal_maximum(ep)[0] / (normal_maximum(experts)[0] * math.sqrt(held))
    return one, independent, min(max_vio, ep - 1.0)
