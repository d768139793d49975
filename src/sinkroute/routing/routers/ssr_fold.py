"""SSR-Fold: the potentials of each plan go into the gate's own bias.

After a step that had a plan with potentials g,

    gate.bias += rate · g

so that the gate itself is balanced, trained on from there, and served as plain top-k with nothing beside the model's
weights. Ours; not in the paper.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from sinkroute.routing.router import Choice
from sinkroute.routing.routers.ssr_kept import SSRKeptRouter

__all__ = ["SSRFoldRouter"]


class SSRFoldRouter(SSRKeptRouter):
    """SSR-L that adds each solve's potentials to the bias of its gate.

    The gate is the one that `make_gate` made, or one that was given to `bind_gate`; it has a bias.

    The bias is the gate's: float32 only if the gate is, and subject to the optimiser's weight decay, which it should
    be kept out of.

    Args:
        see `SSRKeptRouter`.
    """

    serves_plainly = False

    _warned = False

    def make_gate(self, d_model: int) -> nn.Module:
        """A linear map with a bias of 0, which this router moves.

        Raises:
            ValueError: the router has a gate already.
        """
        if self.__dict__.get("_gate"):
            raise ValueError("this ssr-fold router has a gate already; make one router per layer")
        gate = nn.Linear(d_model, self.num_experts)
        nn.init.zeros_(gate.bias)
        self.bind_gate(gate)
        return gate

    def bind_gate(self, gate: nn.Linear) -> None:
        """Tell the router whose bias it is to move.

        Raises:
            ValueError: the gate has no bias of (E,).
        """
        bias = getattr(gate, "bias", None)
        if not isinstance(bias, Tensor) or bias.shape != (self.num_experts,):
            raise ValueError(
                f"gate must have a bias of shape ({self.num_experts},), got {gate}; "
                "make it with nn.Linear(d_model, num_experts, bias=True)"
            )
        self._gate = [gate]  # in a list: the gate is the layer's module, not one more of this router

    def step_sums(self, logits_TE: Tensor, choice: Choice, token_mask: Tensor | None) -> dict[str, Tensor]:
        if choice.bias_E is not None and "_gate" not in self.__dict__ and not self._warned:
            self._warned = True
            warnings.warn(
                "ssr-fold has found potentials, but has no gate to add them to; use router.make_gate(d_model) or "
                "router.bind_gate(gate)",
                stacklevel=2,
            )
        return super().step_sums(logits_TE, choice, token_mask)

    def keep(self, potentials_E: Tensor, known: Tensor) -> None:
        for gate in self.__dict__.get("_gate", []):
            move_E = torch.where(known, self.rate * potentials_E, torch.zeros_like(potentials_E))
            gate.bias.add_(move_E.to(gate.bias.dtype))
