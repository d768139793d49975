"""Loss-free balancing by a bias (Wang et al., arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437).

    choose by s + b, weigh by s;    after each step b_j += u · sign(mean load − load_j)

with the load of the whole batch. The bias is part of the served model: it chooses in `eval()` too, without changing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkroute.routing.card import Card
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.routing.serving import Serving
from sinkroute.routing.state import RouterState

__all__ = ["LossFreeRouter"]


class LossFreeRouter(Router):
    """Top-k of score + bias, the bias moved against the load once per step. The paper's models have `score="sigmoid"`.

    Attributes:
        state: holds `bias_E` (E,) float32.
    """

    card = Card("yes", "yes", "top-k and a count")
    needs_step = True
    state: RouterState

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        update_rate: float = option(1e-3, "u, by which a bias moves in a step", least=0, published=True)

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(num_experts, top_k, **options)
        self.state = RouterState(num_experts, bias_E=torch.zeros(num_experts, device="cpu"))

    def choice_bias(self) -> Serving:
        return Serving(self.state.bias_E, "scores")

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        mean = load_E.double().mean()
        self.state.bias_E += self.update_rate * torch.sign(mean - load_E)
