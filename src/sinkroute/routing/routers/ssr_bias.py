"""SSR-Bias: the potentials of the last plan balance the steps until the next.

A Sinkhorn step finds potentials g with which every expert carries the same mass. Thrown away, they leave the next step
as unbalanced as the one before; kept as a bias that takes part in the choice only,

    choose by z + b, weigh by z;    b ← (1 − rate) · b + rate · g    after a step that had a plan

they balance the steps between too, as the bias of loss-free balancing does (arXiv 2408.15664), in one step instead of
hundreds, and are where the next solve starts from. For models with a correction bias on the scores s(z): the plan of
the scores, choose by s + b, weigh by s. Ours; not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sinkroute.routing.fold import GateFold
from sinkroute.routing.gate import add_bias
from sinkroute.routing.options import option
from sinkroute.routing.routers.ssr_kept import SSRKeptRouter
from sinkroute.routing.scores import scores
from sinkroute.routing.serving import Serving

__all__ = ["SSRBiasRouter"]

ServeWith = Literal["bias", "plain"]
BiasOn = Literal["logits", "scores"]


class SSRBiasRouter(SSRKeptRouter):
    """SSR-L whose potentials stay as a bias of the choice between solves. Without groups."""

    @dataclass(frozen=True, kw_only=True)
    class Options(SSRKeptRouter.Options):
        serve_with: ServeWith = option(
            "bias",
            'the "bias" in the choice, or "plain": top-k of the scores alone, whose loads nothing has balanced. '
            "fold_into(gate) makes the bias a part of the gate",
        )
        bias_on: BiasOn = option(
            "logits",
            'what the bias is added to, and what the plan\'s cost is: the "logits", or their "scores", as in models '
            "with a correction bias (DeepSeek-V3). ξ is 0.5 or 0.1 unless told",
        )

    def default_reg(self) -> float:
        return super().default_reg() if self.bias_on == "logits" else 0.1

    def make_cost(self, logits_TE: Tensor) -> Tensor:
        return super().make_cost(logits_TE) if self.bias_on == "logits" else scores(logits_TE, self.score)

    def choice_bias(self) -> Serving | None:
        return Serving(self.state.bias_E, self.bias_on) if self.training or self.serve_with == "bias" else None

    def serving(self) -> Serving | None:
        plain = self.serve_with == "plain" and self.inference == "none"
        return Serving() if plain else super().serving()

    def starting_potentials(self) -> Tensor:
        return self.state.bias_E

    def fold_into(self, gate: nn.Linear) -> None:
        """Add the bias to that of the gate (made if there is none) and forget it: serving is plain top-k then.

        The choices stay the same; the weights change, as they are of z + b from now on.

        Raises:
            ValueError: the bias is on the scores, and no gate can take it up.
        """
        if self.bias_on == "scores":
            raise ValueError('bias_on="scores": a bias of the scores cannot move into the gate; serve with the bias')
        add_bias(gate)
        GateFold(self, gate, "bias").push()
