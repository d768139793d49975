"""The mixture-of-experts layer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Never

from sinkroute.kernels.storage import holds_values, plain
from sinkroute.moe.capacity import MILLION, millionths, places, within_capacity
from sinkroute.moe.dispatch import combine, dispatch, plan_dispatch
from sinkroute.moe.experts import Experts, refuse_tangents, require_values
from sinkroute.routing import Router, Routes, create_router
from sinkroute.routing.beside import checked_ids, checked_mask, kind_of
from sinkroute.routing.gate import add_bias
from sinkroute.routing.registry import RECOMMENDED

__all__ = ["MoE", "check_inputs", "zero_padding"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class MoE(nn.Module):
    """A sparse feed-forward layer: each token visits K of E experts. Nothing is dropped unless it has a `capacity`.

    Args:
        d_model: D, width of the tokens.
        d_hidden: F, hidden width of each expert.
        num_experts: E.
        top_k: K.
        router: a name from `sinkroute.list_routers()`, or a router made by `sinkroute.create_router`; without one, the
            recommended router, which `print(layer)` names.
        activation: of the experts: `"swiglu"`, `"gelu"` or `"relu"`.
        shared_hidden: hidden width of an expert that all tokens visit beside their K; None: no shared expert.
        bias: whether the experts' matrices have biases.
        gate_bias: whether the gate has a bias, 0 at first; for gates that are a linear map.
        dropout: share of the experts' hidden numbers that is zeroed while training.
        capacity: c; in a training pass with T real tokens each expert takes at most ⌈c · K · T / E⌉ of them, those
            that give it the largest weights, of equal ones those that come first. The other places get no output of
            their expert, and the weights of a token's other experts stay as they are. A pass is a micro-batch on one
            rank. In `eval()` nothing is dropped: what is served must not depend on what else is in the batch. None: no
            limit in training either.
        router_options: options of a router given by name.

    Attributes:
        routes: the `Routes` of the last forward pass (None before it): loads, the auxiliary loss to add, the branch
            taken. They are what the router chose; a capacity changes nothing in them.
        dropped: 0-d int64, how many choices of real tokens the last forward pass dropped; None where nothing is
            limited.

    Raises:
        TypeError: `router` is neither a name nor a router; `capacity` is no number.
        ValueError: sizes that do not fit each other or the router; an unknown name; a capacity that is not above 0.

    >>> import sinkroute
    >>> layer = sinkroute.MoE(d_model=64, d_hidden=128, num_experts=8, top_k=2, router="load-balance")
    >>> x = torch.randn(4, 10, 64)
    >>> layer(x).shape, int(layer.routes.load.sum()), layer.routes.aux_loss.ndim
    (torch.Size([4, 10, 64]), 80, 0)
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        top_k: int,
        router: str | Router = RECOMMENDED,
        activation: str = "swiglu",
        *,
        shared_hidden: int | None = None,
        bias: bool = False,
        gate_bias: bool = False,
        dropout: float = 0.0,
        capacity: float | None = None,
        router_options: dict[str, Any] | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__()
        if unknown:
            raise TypeError(f"MoE got unexpected arguments; options of the router go into router_options={unknown}")
        self.d_model = d_model
        self.router = _made_router(router, num_experts, top_k, router_options or {})
        self.gate = self.router.make_gate(d_model)
        if gate_bias:
            if not isinstance(self.gate, nn.Linear):
                owner = type(self.router).__name__
                raise ValueError(f"gate_bias=True, but the gate of {owner} is no linear map; leave gate_bias out")
            add_bias(self.gate)
        self.experts = Experts(d_model, d_hidden, num_experts, activation, bias=bias, dropout=dropout)
        self.shared: Experts | None = None
        if shared_hidden is not None:
            self.shared = Experts(d_model, shared_hidden, 1, activation, bias=bias, dropout=dropout)
        self._router_name = router if isinstance(router, str) else None
        self._millionths = None if capacity is None else millionths(capacity)
        self.routes: Routes | None = None
        self.dropped: Tensor | None = None

    @property
    def capacity(self) -> float | None:
        return None if self._millionths is None else self._millionths / MILLION

    def extra_repr(self) -> str:
        told = {"router": self._router_name, "capacity": self.capacity}
        return ", ".join(f"{name}={value}" for name, value in told.items() if value is not None)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, *, token_ids: Tensor | None = None) -> Tensor:
        """(..., D) → (..., D).

        Args:
            x: tokens, any leading shape, which may hold no token at all.
            token_mask: the leading shape, bool, True for real tokens. Padding is counted nowhere and comes out as 0.
            token_ids: the leading shape, any integers: what the tokens are, for gates that look at that. "hash" needs
                them, "stable-moe" from the step on with which its routes are frozen; others ignore them.

        Raises:
            TypeError: `x` is no float tensor of 16, 32 or 64 bits, or not of the weights' dtype; a mask that is no bool
                tensor, ids that are no integer tensor.
            ValueError: a last dimension other than D, a mask or ids whose shape is not the leading shape of `x`, or no
                ids for a gate that needs them; weights on the meta device.
            NotImplementedError: forward-mode differentiation (`torch.func.jvp`, `jacfwd`).
        """
        x, token_mask, token_ids = check_inputs(self.router, x, token_mask, token_ids, self.d_model)
        # (..., D) → (T, D)
        mask_T = None if token_mask is None else token_mask.reshape(-1)
        x_TD = zero_padding(x.reshape(-1, self.d_model), mask_T)
        # (T, E)
        logits_TE = self._checked_logits(x_TD, token_ids)
        # experts and weights (T, K)
        self.routes = routes = self.router(logits_TE, mask_T)
        weights_TK, chosen_TK = self._limited(routes, mask_T)
        # (T, D) → (R, D), sorted by expert
        plan = plan_dispatch(routes.experts, self.router.num_experts, self._computed(routes, chosen_TK))
        x_RD = dispatch(x_TD, plan)
        y_RD = self.experts(x_RD, plan.ends_E)
        # (R, D) → (T, D)
        y_TD = combine(y_RD, weights_TK, plan)
        if self.shared is not None:
            all_rows = torch.full((1,), x_TD.shape[0], dtype=torch.int32, device=x.device)
            # Padding is 0, but a bias makes something of that.
            y_TD = y_TD + zero_padding(self.shared(x_TD, all_rows), mask_T)
        # (T, D) → (..., D)
        return y_TD.view(*x.shape[:-1], self.d_model)

    def _limited(self, routes: Routes, mask_T: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights (T, K) and places (T, K) bool, None: all, of what the experts take of the router's choices."""
        self.dropped = None
        if self._millionths is None or not self.training:
            return routes.weights, routes.chosen
        experts_TK, chosen_TK, num_experts = routes.experts, routes.chosen, self.router.num_experts
        tokens = len(experts_TK) if mask_T is None else mask_T.sum()
        most = places(self._millionths, tokens, num_experts, self.router.top_k)
        kept_TK = within_capacity(experts_TK, routes.weights, most, num_experts, chosen_TK)
        self.dropped = routes.load.sum() - kept_TK.sum()
        return routes.weights.masked_fill(~kept_TK, 0.0), kept_TK

    def _computed(self, routes: Routes, chosen_TK: Tensor | None) -> Tensor | None:
        """(T, K) bool, the places whose experts are computed; None: all, whether or not they are a choice."""
        # Shapes that depend on the data would be compiled anew, or not at all; fake tensors have none.
        if torch.compiler.is_compiling() or not holds_values(routes.experts):
            return None
        # A device would have to be waited for. Where the router has more columns than K it has been waited for already,
        # and most places may be empty.
        known = routes.experts.device.type == "cpu" or routes.experts.shape[1] > self.router.top_k
        return chosen_TK if known else None

    def _checked_logits(self, x_TD: Tensor, token_ids: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            return self._logits(x_TD, token_ids)
        try:
            return self._logits(x_TD, token_ids)
        except Exception:  # ranks that wait for this one are told
            self.router.withdraw(x_TD.device)
            raise

    def _logits(self, x_TD: Tensor, token_ids: Tensor | None) -> Tensor:
        """The gate's logits in float32 or better, whatever the model's dtype or autocast: near-ties decide routes."""
        # Before the gate: of some dtypes torch makes no error of weights without values, but logits from nowhere.
        require_values(self.experts.w_in, x_TD)
        for link in self.router.links:
            link.see(x_TD)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD, gate = x_TD.to(dtype), self.gate
        # The meta device has no autocast.
        with nullcontext() if x_TD.is_meta else torch.autocast(x_TD.device.type, enabled=False):
            # Only gates that take ids say whether they need them.
            needs_ids = getattr(gate, "needs_token_ids", None)
            if needs_ids and token_ids is None:
                raise ValueError(
                    f"{type(self.router).__name__} routes by what a token is: call the layer with token_ids=, "
                    "integers of the leading shape of x"
                )
            if needs_ids is not None:
                # int64: a remainder, or an index, of fewer bits would go wrong.
                logits_TE: Tensor = gate(x_TD, None if token_ids is None else token_ids.reshape(-1).long())
            elif isinstance(gate, nn.Linear) and gate.weight.dtype != dtype:
                # A gate in low precision: its weights are lifted, which its own forward would not do.
                bias_E = None if gate.bias is None else gate.bias.to(dtype)
                logits_TE = F.linear(x_TD, gate.weight.to(dtype), bias_E)
            else:
                logits_TE = gate(x_TD)
        require_values(logits_TE, x_TD)
        return logits_TE

    def __getstate__(self) -> dict[str, Any]:
        # The last routes belong to a graph: they cannot be copied (an average of the model's weights is a deep copy)
        # or saved.
        return {**super().__getstate__(), "routes": None}  # type: ignore[no-untyped-call]


def zero_padding(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """(..., D) with 0 at padding: what that holds, NaN included, must reach no output and no gradient.

    >>> zero_padding(torch.tensor([[1.0], [torch.nan]]), torch.tensor([True, False])).tolist()
    [[1.0], [0.0]]
    """
    return x if token_mask is None else x.masked_fill(~token_mask[..., None], 0.0)


def _made_router(router: str | Router, num_experts: int, top_k: int, options: dict[str, Any]) -> Router:
    """The router of a layer with E experts, K a token."""
    if isinstance(router, str):
        return create_router(router, num_experts=num_experts, top_k=top_k, **options)
    if not isinstance(router, Router):
        raise TypeError(
            f"router must be a name or a Router, got {router!r} ({type(router).__name__}); take one of "
            'sinkroute.list_routers(), such as "softmax", or make one with sinkroute.create_router'
        )
    if options:
        raise ValueError(f"router_options={options} go with a router's name; this router is made already")
    if (router.num_experts, router.top_k) != (num_experts, top_k):
        raise ValueError(
            f"router is made for num_experts={router.num_experts}, top_k={router.top_k}, "
            f"but the layer for num_experts={num_experts}, top_k={top_k}; make them equal"
        )
    return router


def check_inputs(
    router: Router, x: Tensor, token_mask: Tensor | None, token_ids: Tensor | None, d_model: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens (..., D), the mask and the ids for them, `plain`. What is of a wrong form is refused; ranks that wait for
    this one are told.

    Raises:
        TypeError: `x` is no float tensor of 16, 32 or 64 bits, a mask that is no bool tensor, ids that are no integers.
        ValueError: a last dimension other than D, a mask or ids whose shape is not the leading shape of `x`.
        NotImplementedError: `x` carries a tangent.
    """
    try:
        x = _checked_tokens(x, d_model)
        token_mask = checked_mask(token_mask, x, x.shape[:-1])
        token_ids = None if token_ids is None else checked_ids(token_ids, x)
    except Exception:
        if not torch.compiler.is_compiling():
            router.withdraw(x.device if isinstance(x, Tensor) else torch.device("cpu"))
        raise
    return x, token_mask, token_ids


def _checked_tokens(x: Tensor, d_model: int) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a float tensor, got {kind_of(x)}; pass tokens (..., {d_model}), not their ids")
    x = plain("x", x)
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"x must be a float tensor of 16, 32 or 64 bits, got {kind_of(x)}, with which nothing can be computed; "
            "call x.to(torch.bfloat16), or the dtype of the layer's weights"
        )
    if x.ndim == 0 or x.shape[-1] != d_model:
        raise ValueError(f"x must have a last dimension of d_model={d_model}, got shape {tuple(x.shape)}")
    refuse_tangents(x=x)
    return x
