"""Multi-head mixture of experts, MH-MoE (Wu et al., arXiv 2404.15045, section 2; code: github.com/yushuiwx/MH-MoE).

A token of width D becomes h sub-tokens of width D/h, each of which visits its own K experts:

    x̃ = split(x),   x̃ = [s_1 … s_h],   o_i = Σ_k weight_k(s_i) · expert_k(s_i),   y = merge([o_1 … o_h])

with split and merge linear maps D → D with biases, experts on width D/h, and one gate for all sub-tokens. So a token
meets up to h·K experts for the arithmetic of K narrow ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sinkroute.moe.experts import ACTIVATIONS
from sinkroute.moe.layer import MoE, check_inputs, zero_padding
from sinkroute.routing import Router, Routes
from sinkroute.routing.registry import RECOMMENDED

__all__ = ["MultiHeadMoE"]


class MultiHeadMoE(nn.Module):
    """A mixture whose experts see each token in h parts.

    Args:
        d_model: D, width of the tokens.
        heads: h, into how many sub-tokens a token is split; divides D.
        d_hidden: F, hidden width of each expert; `parity_hidden` tells which makes it as large as a plain `MoE`.
        num_experts: E.
        top_k: K, experts per sub-token.
        router, activation: see `MoE`. A router counts and balances sub-tokens.
        options: the other options of `MoE`: `shared_hidden`, `bias`, `gate_bias`, `dropout`, `capacity`,
            `router_options`. A capacity is of sub-tokens.

    Attributes:
        moe: the `MoE` of width D/h in the middle.
        routes: its `Routes` of the last forward pass, (T·h, K) (None before it); a token's sub-tokens are neighbours.
        dropped: its count of choices that the last forward pass dropped, see `MoE`.

    Raises:
        ValueError: heads that do not divide D, and whatever `MoE` refuses.

    >>> import torch, sinkroute
    >>> layer = sinkroute.MultiHeadMoE(d_model=64, heads=4, d_hidden=256, num_experts=8, top_k=2)
    >>> layer(torch.randn(5, 10, 64)).shape, layer.routes.experts.shape
    (torch.Size([5, 10, 64]), torch.Size([200, 2]))
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        d_hidden: int,
        num_experts: int,
        top_k: int,
        router: str | Router = RECOMMENDED,
        activation: str = "swiglu",
        **options: Any,
    ) -> None:
        super().__init__()
        self.d_model, self.heads = d_model, heads
        self.split = _XavierLinear(d_model, gain=1 / math.sqrt(2), zero_bias=False)
        self.moe = MoE(_sub_width(d_model, heads), d_hidden, num_experts, top_k, router, activation, **options)
        self.merge = _XavierLinear(d_model, gain=1.0, zero_bias=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Split and merge as in the authors' code: Xavier, the split's with a gain of 1/√2, no bias after merging."""
        self.split.draw()
        self.merge.draw()

    def extra_repr(self) -> str:
        return f"heads={self.heads}"

    @property
    def routes(self) -> Routes | None:
        return self.moe.routes

    @property
    def dropped(self) -> Tensor | None:
        return self.moe.dropped

    def forward(self, x: Tensor, token_mask: Tensor | None = None, *, token_ids: Tensor | None = None) -> Tensor:
        """(..., D) → (..., D); arguments and errors are those of `MoE.forward`. Sub-tokens are what their token is."""
        x, token_mask, token_ids = check_inputs(self.moe.router, x, token_mask, token_ids, self.d_model)
        # (..., D) → (..., h, D/h)
        parts = self.split(zero_padding(x, token_mask)).unflatten(-1, (self.heads, -1))
        mask, ids = (None if of is None else of[..., None].expand(parts.shape[:-1]) for of in (token_mask, token_ids))
        # (..., h, D/h), each part by its experts
        parts = self.moe(parts, mask, token_ids=ids)
        # (..., h, D/h) → (..., D)
        return zero_padding(self.merge(parts.flatten(-2)), token_mask)

    @staticmethod
    def parity_hidden(
        d_model: int,
        heads: int,
        d_hidden: int,
        num_experts: int,
        activation: str = "swiglu",
        *,
        shared_hidden: int | None = None,
        bias: bool = False,
    ) -> int:
        """The hidden width with which this layer has as many parameters as `MoE` with `d_hidden`.

        As near as a whole number comes; for routers whose gate is a linear map (its bias is the same in both).

        Raises:
            ValueError: heads that do not divide D; split and merge alone have more parameters than the plain layer.

        >>> MultiHeadMoE.parity_hidden(352, 2, 352, 16, "relu", bias=True)
        660
        """
        width = _sub_width(d_model, heads)
        maps_in = 1 + ACTIVATIONS[activation][1]

        def parameters(width: int, hidden: int) -> int:
            shared = 0 if shared_hidden is None else expert(width, shared_hidden)
            return num_experts * expert(width, hidden) + shared + num_experts * width

        def expert(width: int, hidden: int) -> int:
            return (maps_in + 1) * width * hidden + bias * (maps_in * hidden + width)

        around = 2 * (d_model**2 + d_model)
        spare = parameters(d_model, d_hidden) - around - parameters(width, 0)
        hidden = round(spare / (parameters(width, 1) - parameters(width, 0)))
        if hidden < 1:
            raise ValueError(
                f"no d_hidden of 1 or more has as few parameters as a plain layer with d_hidden={d_hidden}, "
                f"num_experts={num_experts}: split and merge alone have {around}; enlarge the plain layer"
            )
        return hidden


class _XavierLinear(nn.Linear):
    """A map D → D with Xavier's initial weight, and a bias that is `nn.Linear`'s or 0.

    It draws them itself: what makes models from the meta device resets every module, the layer before its maps.
    """

    _gain: float | None = None

    @torch.inference_mode(False)  # it is to be trained, wherever it is made
    def __init__(self, width: int, gain: float, zero_bias: bool) -> None:
        super().__init__(width, width)
        self._gain, self._zero_bias = gain, zero_bias

    def _get_name(self) -> str:  # in descriptions
        return "Linear"

    def draw(self) -> None:
        """Xavier's weight, and a bias of 0 if it is to be so."""
        assert self._gain is not None
        nn.init.xavier_uniform_(self.weight, gain=self._gain)
        if self._zero_bias:
            nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self._gain is not None:  # nn.Linear is being made: the layer calls `draw` when all its parts are there
            self.draw()


def _sub_width(d_model: int, heads: int) -> int:
    if heads < 1 or d_model % heads:
        raise ValueError(f"heads must divide d_model={d_model}, got {heads}; a token is split into equal parts")
    return d_model // heads
