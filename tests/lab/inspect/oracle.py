"""The choices of five families, one token at a time, in plain Python: from their papers and configurations."""

from __future__ import annotations

import math
from typing import Any

import torch


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


def sigmoid(logits: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-value)) for value in logits]


def best(values: list[float], k: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda expert: -values[expert])[:k])


def chosen(config: Any, logits: list[float], bias: list[float] | None = None) -> set[int]:
    """Of one token. DeepSeek-V3: groups by the sum of their two best corrected scores, then experts in them."""
    k = config.num_experts_per_tok
    if bias is None:
        return best(logits, k)
    corrected = [score + more for score, more in zip(sigmoid(logits), bias, strict=True)]
    size = len(corrected) // config.n_group
    groups = [sum(sorted(corrected[g * size : (g + 1) * size])[-2:]) for g in range(config.n_group)]
    kept = best(groups, config.topk_group)
    return best([value if j // size in kept else -math.inf for j, value in enumerate(corrected)], k)


def logits_of(model: Any, windows: list[list[int]]) -> list[list[list[float]]]:
    """Per layer and token, one window at a time, from what the model records."""
    layers: list[list[list[float]]] = []
    with torch.no_grad():
        for window in windows:
            recorded = model(input_ids=torch.tensor([window]), output_router_logits=True).router_logits
            for place, logits in enumerate(recorded):
                if place == len(layers):
                    layers.append([])
                layers[place] += logits.reshape(-1, logits.shape[-1]).double().tolist()
    return layers


def plan(costs: list[list[float]], reg: float) -> list[list[float]]:
    """Sinkhorn's iteration in float64, to the end."""
    kernel = torch.tensor(costs, dtype=torch.float64).div(reg).softmax(-1)
    target = len(costs) / len(costs[0])
    for _ in range(1000):
        kernel = kernel * (target / kernel.sum(0))
        kernel = kernel / kernel.sum(1, keepdim=True)
    rows: list[list[float]] = kernel.tolist()
    return rows
