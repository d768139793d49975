"""SSR-Fold: the potentials of each plan go into the gate itself.

After a step that had a plan with potentials g,

    gate.bias   += rate · g                                   if the gate has a bias, else
    gate.weight += rate · g ⊗ m / E[(m̂·x)²]                   m the mean token of the step, m̂ its direction

so that the gate itself is balanced, trained on from there, and served as plain top-k with nothing beside the model's
weights. Tokens have a large part in common (what a layer norm leaves of the residual stream's mean): with u = m / |m|²,
u·x is about 1 for all of them, and g ⊗ u about a bias. The factor above is the least-squares one, near 0 where tokens
have nothing in common. Ours; not in the paper.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sinkroute.routing.gate import LinearGate
from sinkroute.routing.options import option
from sinkroute.routing.ranks import distribute
from sinkroute.routing.routers.ssr_kept import SSRKeptRouter
from sinkroute.routing.routes import Routes
from sinkroute.routing.state import recomputing

__all__ = ["SSRFoldRouter"]

Gate = Literal["bias", "plain"]


class SSRFoldRouter(SSRKeptRouter):
    """SSR-L that adds each solve's potentials to its gate: to the bias, or to a weight without one.

    The gate is the one that `make_gate` made, or one that was given to `bind_gate`.

    What is moved is the gate's: float32 only if the gate is, and subject to the optimiser's weight decay, out of which
    a bias should be kept.

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
        """A linear map, with a bias of 0 or without one, which this router moves.

        Raises:
            ValueError: the router has a gate already.
        """
        if self.__dict__.get("_gate"):
            raise ValueError("this ssr-fold router has a gate already; make one router per layer")
        gate = _FoldGate(d_model, self.num_experts, bias=self.gate == "bias")
        self.bind_gate(gate)
        return gate

    def bind_gate(self, gate: nn.Module) -> None:
        """Tell the router whose bias it is to move, or whose weight if there is no bias.

        Raises:
            ValueError: the gate has neither a bias of (E,) nor, without one, a weight of (E, D).
        """
        if getattr(gate, "bias", None) is not None:
            self.bind_part(gate, "bias")
        else:
            self.bind_part(gate, "weight")
            gate.register_forward_pre_hook(_Hand(self), with_kwargs=True)

    def bind_part(self, gate: nn.Module, name: str) -> None:
        """Tell the router what it is to move: a bias, or a weight, with which the caller calls `see` before each
        training pass.

        Args:
            gate: holds it.
            name: dotted, of the tensor in the gate: (E,) or (E, D).

        Raises:
            ValueError: the gate has no such tensor.
        """
        found: Any = gate
        for part in name.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, Tensor) or found.ndim > 2 or found.shape[0] != self.num_experts:
            raise ValueError(
                f"gate must have a bias of shape ({self.num_experts},) or a weight of shape ({self.num_experts}, D), "
                f"got {gate}; make it with nn.Linear(d_model, num_experts)"
            )
        self._gate = [gate]  # in a list: the gate is the layer's module, not one more of this router
        self._name, self._width = name, found.shape[1] if found.ndim == 2 else 0
        self.state = self.make_state()  # it counts tokens, too

    def see(self, tokens: Tensor) -> None:
        """What the gate is given in this pass, (..., D); before the router is called with its logits."""
        if self._width and self.training and self.sinkhorn_now and not recomputing():
            self._tokens = tokens.detach()

    _tokens: Tensor | None = None
    _width = 0  # of tokens; 0: a bias is moved

    def _moved(self) -> Any:
        """What is moved, found anew each time: moving a model makes new tensors."""
        found: Any = self._gate[0]
        for part in self._name.split("."):
            found = getattr(found, part)
        return found

    def state_sums(self) -> dict[str, int]:
        return super().state_sums() | ({"token": self._width, "spread": 1} if self._width else {})

    def step_sums(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> dict[str, Tensor]:
        sums = super().step_sums(logits_TE, routes, token_mask)
        if routes.potentials is None:
            return sums
        if "_gate" not in self.__dict__ and not self._warned:
            self._warned = True
            warnings.warn(
                "ssr-fold has found potentials, but has no gate to add them to; use router.make_gate(d_model) or "
                "router.bind_gate(gate)",
                stacklevel=2,
            )
        return sums | (self._sum_tokens(token_mask) if self._width else {})

    @torch.no_grad()
    def _sum_tokens(self, token_mask: Tensor | None) -> dict[str, Tensor]:
        if self._tokens is None:
            raise RuntimeError("ssr-fold moves a weight and needs to see the tokens: call router.see before it")
        tokens_TD, self._tokens = self._tokens.flatten(0, -2).float(), None
        if token_mask is not None:
            tokens_TD = tokens_TD.masked_fill(~token_mask[:, None], 0.0)  # padding may be anything
        token_D = tokens_TD.sum(0)
        unit_D = token_D / token_D.norm().clamp(min=1e-20)
        with torch.autocast(tokens_TD.device.type, enabled=False):
            along_T = tokens_TD @ unit_D
        return {"token": token_D.double(), "spread": along_T.square().sum().double().view(1)}

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        if "token" in sums:
            # Σ x / Σ (m̂·x)², m̂ along the mean of its micro-batch: where these differ, it is the shorter for that.
            self._direction_D = sums["token"] / sums["spread"].clamp(min=1e-20)
        super().finish_step(load_E, sums)

    def keep(self, potentials_E: Tensor, known: Tensor) -> None:
        if "_gate" not in self.__dict__:
            return
        moved = self._moved()
        if moved.is_meta:
            raise RuntimeError(
                f"ssr-fold cannot move {self._name} of {type(self._gate[0]).__name__}: it is on the meta device "
                "between passes (offloading); keep the gate where it is used"
            )
        move = self.rate * potentials_E
        if self._width:
            move = torch.outer(move, self._direction_D)
        # A solve or a pass that failed on a device, which cannot say so, is not kept.
        move = torch.where(known & move.isfinite().all(), move, torch.zeros_like(move)).to(moved.dtype)
        if hasattr(moved, "device_mesh"):  # sharded
            move = distribute(move, moved)
        moved.add_(move)


class _FoldGate(LinearGate):
    """A linear gate that draws a bias too, and drops it: from the same seed, the other layers stay what they were."""

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Hand:
    """A hook that hands the router what its gate is given."""

    def __init__(self, router: SSRFoldRouter) -> None:
        self.router = router

    def __call__(self, gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.router.see(args[0] if args else next(iter(kwargs.values())))
