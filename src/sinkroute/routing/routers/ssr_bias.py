"""SSR-Bias: the potentials of the last plan balance the steps until the next.

A Sinkhorn step finds potentials g with which every expert carries the same mass. Thrown away, they leave the next step
as unbalanced as the one before; kept as a bias that takes part in the choice only,

    choose by z + b, weigh by z;    b ← (1 − rate) · b + rate · g    after a step that had a plan

they balance the steps between too, as the bias of loss-free balancing does (arXiv 2408.15664), in one step instead of
hundreds, and are where the next solve starts from. Ours; not in the paper.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from sinkroute._errors import unknown_name
from sinkroute.routing.router import Choice
from sinkroute.routing.routers.ssr_kept import SSRKeptOptions, SSRKeptRouter
from sinkroute.routing.state import RouterState

__all__ = ["SSRBiasRouter"]

ServeWith = Literal["bias", "plain"]


class SSRBiasRouter(SSRKeptRouter):
    """SSR-L whose potentials stay as a bias of the choice between solves.

    Args:
        serve_with: the `"bias"` in the choice, or `"plain"`: top-k of the scores alone, whose loads nothing has
            balanced. `fold_into(gate)` makes the bias a part of the gate.
        options: see `SSRKeptRouter`: rate, balance, balance_tol, and those of `SSRRouter`. Without groups.

    Attributes:
        state: holds `bias_E` (E,) float32.
    """

    state: RouterState

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        serve_with: ServeWith = "bias",
        **options: Unpack[SSRKeptOptions],
    ) -> None:
        if serve_with not in get_args(ServeWith):
            raise unknown_name("serve_with", serve_with, get_args(ServeWith))
        self.serve_with = serve_with
        super().__init__(num_experts, top_k, **options)

    @property
    def serves_plainly(self) -> bool:  # type: ignore[override]
        return self.serve_with == "plain"

    def state_values(self) -> dict[str, Tensor]:
        return super().state_values() | {"bias_E": torch.zeros(self.num_experts, device="cpu")}

    def gate_bias(self) -> Tensor:
        return self.state.bias_E

    def serve_topk(self, logits_TE: Tensor) -> Choice:
        return self.gate_topk(logits_TE) if self.serve_with == "bias" else self.score_topk(logits_TE)

    def starting_potentials(self) -> Tensor:
        return self.state.bias_E

    def keep(self, potentials_E: Tensor, known: Tensor) -> None:
        bias_E = self.state.bias_E
        bias_E.copy_(torch.where(known, torch.lerp(bias_E.double(), potentials_E, self.rate), bias_E))

    @torch.no_grad()
    def fold_into(self, gate: nn.Linear) -> None:
        """Add the bias to that of the gate (made if there is none) and forget it: serving is plain top-k then.

        The choices stay the same; the weights change, as they are of z + b from now on.
        """
        if gate.bias is None:
            gate.bias = nn.Parameter(torch.zeros_like(gate.weight[:, 0]))
        gate.bias.add_(self.state.bias_E.to(gate.bias.dtype))
        self.state.bias_E.zero_()
