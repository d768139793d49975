"""SSR-Fold: SSR-Bias whose bias is in the gate itself.

The potentials of each plan are added to the gate when the step is over, as `sinkroute.routing.fold` has it: to its
bias, or to a weight without one. So the gate itself is balanced, trained on from there, and served as plain top-k with
nothing beside the model's weights. Ours; not in the paper.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sinkroute.routing.fold import GateFold
from sinkroute.routing.gate import LinearGate
from sinkroute.routing.options import option
from sinkroute.routing.routers.ssr_kept import SSRKeptRouter
from sinkroute.routing.routes import Routes

__all__ = ["SSRFoldRouter"]

Gate = Literal["bias", "plain"]


class SSRFoldRouter(SSRKeptRouter):
    """SSR-L that adds each solve's potentials to its gate: to the bias, or to a weight without one.

    The gate is the one that `make_gate` made, or that of a `GateFold` in `links`.

    Without groups.
    """

    moves_gate = True
    _warned = False

    @dataclass(frozen=True, kw_only=True)
    class Options(SSRKeptRouter.Options):
        gate: Gate = option(
            "bias", 'what make_gate makes: one with a "bias", or "plain", as in most models (Mixtral, OLMoE, Qwen)'
        )

    def make_gate(self, d_model: int) -> nn.Module:
        """A linear map, with a bias of 0 or without one, into which this router folds its potentials.

        Who calls a plain one hands its tokens to `see` of the router's `links` before the router, as `MoE` does.

        Raises:
            ValueError: the router has a gate already.
        """
        if self.links:
            raise ValueError("this ssr-fold router has a gate already; make one router per layer")
        gate = _FoldGate(d_model, self.num_experts, bias=self.gate == "bias")
        self.links.append(GateFold(self, gate, "weight" if gate.bias is None else "bias"))
        return gate

    def rebase(self, moved_E: Tensor) -> None:
        self.state.bias_E.zero_()  # what the gate did not take up, the next plan finds anew

    def step_sums(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> dict[str, Tensor]:
        if routes.potentials is not None and not self.links and not self._warned:
            self._warned = True
            warnings.warn(
                "ssr-fold has found potentials, but has no gate to add them to; use router.make_gate(d_model), or "
                'router.links.append(GateFold(router, gate, "bias")) of sinkroute.routing.fold',
                stacklevel=2,
            )
        return super().step_sums(logits_TE, routes, token_mask)


class _FoldGate(LinearGate):
    """A linear gate that draws a bias too, and drops it: from the same seed, the other layers stay what they were."""

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
