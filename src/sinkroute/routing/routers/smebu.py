"""SMEBU, soft-clamped momentum expert bias updates (Arcee Trinity Large, arXiv 2602.17004).

    choose by s + b, weigh by s;    after each step, with the load of the whole batch,

    v_j = (mean load − load_j) / mean load           relative to the mean: of any batch size
    d_j = λ · tanh(κ · v_j),  then centred           loss-free balancing has u · sign(v_j)
    m_j ← β · m_j + (1 − β) · d_j
    b_j ← b_j + m_j

Near balance the steps of loss-free balancing stay as large as ever, and the bias goes to and fro; these vanish. Far
from it they are at most λ. The bias chooses in `eval()` too, without changing.

The rule and its constants are taken from accounts of the report, not from its text. Readings: d is centred before it
enters the momentum (m and b stay centred either way), m begins at 0 without a correction for it, a step without real
tokens changes neither m nor b. The report trains with a balancing loss within sequences beside it, 1e-4, and sigmoid
scores; both are left to the options that every router has.
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

__all__ = ["SMEBURouter"]

_TOLD = "the default is what accounts of the report tell"


class SMEBURouter(Router):
    """Top-k of score + bias, the bias moved by a momentum of clamped violations once per step.

    The paper's models have `score="sigmoid"`.

    Attributes:
        state: holds `bias_E` and `momentum_E` (E,) float32.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("smebu", num_experts=2, top_k=1, update_rate=0.5, momentum=0.0)
    >>> sinkroute.set_step(router, 0)
    >>> router(torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])).load.tolist()
    [3, 1]
    >>> sinkroute.end_step(router)
    >>> [round(bias, 4) for bias in router.state.bias_E.tolist()]  # 0.5 · tanh(2 · 0.5)
    [-0.3808, 0.3808]
    """

    card = Card("yes", "yes", "top-k and a count")
    needs_step = True
    state: RouterState

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        update_rate: float = option(5e-4, "λ, by which a bias moves in a step at most", least=0, hint=_TOLD)
        momentum: float = option(0.5, "β, how much of the move of the step before stays", least=0, below=1, hint=_TOLD)
        slope: float = option(2.0, "κ, of the clamp at balance: tanh(κ · violation)", above=0, hint=_TOLD)

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(num_experts, top_k, **options)
        zeros_E = torch.zeros(num_experts, device="cpu")
        self.state = RouterState(num_experts, bias_E=zeros_E, momentum_E=zeros_E)

    def choice_bias(self) -> Serving:
        return Serving(self.state.bias_E, "scores")

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        bias_E, momentum_E = self.state.bias_E, self.state.momentum_E
        mean = load_E.double().mean()
        known = mean > 0
        violation_E = 1 - load_E / mean.clamp(min=1e-9)
        move_E = self.update_rate * torch.tanh(self.slope * violation_E)
        moved_E = torch.lerp(move_E - move_E.mean(), momentum_E.double(), self.momentum)
        momentum_E.copy_(torch.where(known, moved_E, momentum_E))
        bias_E.copy_(torch.where(known, bias_E + moved_E, bias_E))
