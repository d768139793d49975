"""Loss-free balancing by a bias (Wang et al., arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437).

    choose by s + b, weigh by s;    after each step b_j += u · sign(mean load − load_j)

with the load of the whole batch. The bias is part of the served model: it chooses in `eval()` too, without changing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Unpack

from sinkroute._errors import require_numbers
from sinkroute.routing.router import CommonOptions, Router, Serving
from sinkroute.routing.state import RouterState

__all__ = ["LossFreeRouter"]


class LossFreeRouter(Router):
    """Top-k of score + bias, the bias moved against the load once per step.

    Args:
        update_rate: u, by which a bias moves in a step; 0.001 is the published value.
        common: see `Router`. The paper's models have `score="sigmoid"`.

    Attributes:
        state: holds `bias_E` (E,) float32.
    """

    needs_step = True
    state: RouterState

    def __init__(
        self, num_experts: int, top_k: int, *, update_rate: float = 1e-3, **common: Unpack[CommonOptions]
    ) -> None:
        super().__init__(num_experts, top_k, **common)
        require_numbers(update_rate=update_rate)
        if not (update_rate >= 0 and math.isfinite(update_rate)):
            raise ValueError(
                f"update_rate must be a finite number of 0 or more, got {update_rate}; 0.001 is the published value"
            )
        self.update_rate = update_rate
        self.state = RouterState(num_experts, bias_E=torch.zeros(num_experts, device="cpu"))

    def choice_bias(self) -> Serving:
        return Serving(self.state.bias_E, "scores")

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        mean = load_E.double().mean()
        self.state.bias_E += self.update_rate * torch.sign(mean - load_E)
