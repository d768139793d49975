"""The problems: Gaussian logits with an optional bias per expert, four sizes and a few with a million tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

SIZES = ((4096, 16), (16384, 64), (65536, 128), (65536, 256))
MILLION = (1 << 20, 64)
LARGE = 1 << 16
"""Tokens from which on peers are brought to 1e-3 only: to 1e-6 they would take longer than all the rest together."""
REGS = (1.0, 0.5, 0.1, 0.05, 0.01)
SCORES = ((1.0, 0.0), (1.0, 2.0), (4.0, 0.0), (4.0, 2.0))
COSTS = ("linear", "softmax")


@dataclass(frozen=True)
class Problem:
    """Scores `scale · N(0, 1) + bias · N(0, 1)_E` of a seed, the entropy weight and the cost."""

    tokens: int
    experts: int
    scale: float
    bias: float
    cost: str
    reg: float
    seed: int

    @property
    def size(self) -> str:
        return f"{self.tokens}x{self.experts}"

    @property
    def name(self) -> str:
        return f"{self.size} scale {self.scale:g} bias {self.bias:g} {self.cost} reg {self.reg:g}"

    def logits(self) -> Tensor:
        """(T, E) float32."""
        generator = torch.Generator().manual_seed(self.seed)
        logits_TE = self.scale * torch.randn(self.tokens, self.experts, generator=generator)
        return logits_TE.add_(torch.randn(self.experts, generator=generator), alpha=self.bias)

    def drifted(self, logits_TE: Tensor) -> Tensor:
        """The logits a step later: with 5 % noise."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        noise_TE = torch.randn(logits_TE.shape, generator=generator)
        return noise_TE.mul_(0.05 * float(logits_TE.std())).add_(logits_TE)

    def cost_of(self, logits_TE: Tensor) -> Tensor:
        """What a peer has to make of the logits first: (T, E), to be maximised."""
        return logits_TE if self.cost == "linear" else logits_TE.softmax(dim=1)


def grid(seed: int, quick: bool, only: Sequence[str]) -> list[Problem]:
    """All problems, small sizes first; `quick`: a cross-section; `only`: these sizes."""
    parts: list[tuple[tuple[int, int], str, Sequence[float], Sequence[tuple[float, float]]]]
    if quick:
        few = (1.0, 0.1, 0.01)
        parts = [(SIZES[0], cost, few, SCORES[1:3]) for cost in COSTS]
        parts += [(SIZES[1], cost, few, SCORES[1:2]) for cost in COSTS]
        parts += [(SIZES[2], cost, few[1:2], SCORES[1:2]) for cost in COSTS]
    else:
        parts = [(size, cost, REGS, SCORES) for size in SIZES for cost in COSTS]
        parts += [(MILLION, cost, (1.0, 0.1, 0.01), SCORES[1:2]) for cost in COSTS]
    problems = [
        Problem(*size, scale, bias, cost, reg, seed)
        for size, cost, regs, logits in parts
        for (scale, bias), reg in product(logits, regs)
    ]
    return [problem for problem in problems if not only or problem.size in only]
