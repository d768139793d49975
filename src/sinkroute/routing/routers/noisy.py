"""Noisy top-k gating (Shazeer et al., arXiv 1701.06538, sections 2.1 and 4, appendix A).

    h_ij = z_ij + ε_ij · σ_ij,    ε_ij ~ N(0, 1),    σ_ij = softplus((x_i W_noise)_j) + 0.01

In training the experts are the top-k of h, the weights their scores in h, and two losses balance them:

    importance_j = Σ_i w_ij                              w the weights, 0 where not chosen
    load_j       = Σ_i Φ((z_ij − h_i(k, without j)) / σ_ij)
    loss         = importance_coefficient · CV(importance)² + load_coefficient · CV(load)²

Φ is the standard normal distribution function and h_i(k, without j) the k-th largest h_i of the other experts: the
chance that expert j would be among the k if only its own noise were drawn again. So the count of tokens becomes smooth,
and the width of the noise is learned. Serving is plain top-k of z. The 0.01 is not in the paper but in its authors'
code; without it a width can underflow to 0, and the load has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkroute.routing.card import Card
from sinkroute.routing.gate import LinearGate
from sinkroute.routing.losses.importance import cv_squared
from sinkroute.routing.masked import mean_over_tokens
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes

__all__ = ["NoisyRouter", "smooth_load_loss"]

_LEAST_WIDTH = 0.01


class NoisyRouter(Router):
    """Top-k of logits with noise whose width the gate learns, and two losses.

    The gate (`make_gate`) gives 2·E numbers per token: E logits, then E raw widths of their noise. Given E numbers, the
    router takes the raw widths to be 0: a width of ln 2 + 0.01. Without groups.

    >>> import sinkroute
    >>> router = sinkroute.create_router("noisy", num_experts=4, top_k=2)
    >>> gate = router.make_gate(d_model=16)
    >>> routes = router(gate(torch.randn(10, 16)))
    >>> gate.weight.shape, routes.experts.shape, routes.aux_loss.ndim
    (torch.Size([8, 16]), torch.Size([10, 2]), 0)
    """

    card = Card("yes", "yes", "top-k of noisy logits, a gate of twice the width, and two losses")
    logit_parts = 2
    needs_step = True
    keeps_groups = False

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        importance_coefficient: float = option(
            0.1, "of the loss on the experts' total weights", least=0, published=True
        )
        load_coefficient: float = option(0.1, "of the loss on the smooth load", least=0, published=True)

    def make_gate(self, d_model: int) -> nn.Module:
        """A bias-free linear map from (T, D) to logits and raw widths, (T, 2·E).

        All zeros at first, as in the paper: then noise alone chooses, and the load is even from the start.
        """
        return _ZeroGate(d_model, 2 * self.num_experts)

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        clean_TE, raw_TE = logits_TE[:, : self.num_experts], logits_TE[:, self.num_experts :]
        if raw_TE.shape[1] == 0:
            raw_TE = torch.zeros_like(clean_TE)
        width_TE = F.softplus(raw_TE) + _LEAST_WIDTH
        noisy_TE = clean_TE + width_TE * self.draw_normal(clean_TE)
        routes = self.topk(noisy_TE)
        all_weights_TE = torch.zeros_like(noisy_TE).scatter(1, routes.experts, routes.weights)
        importance = cv_squared(mean_over_tokens(all_weights_TE, token_mask))
        load = smooth_load_loss(clean_TE, noisy_TE, width_TE, self.top_k, token_mask)
        aux_loss = self.importance_coefficient * importance + self.load_coefficient * load
        return replace(routes, aux_loss=aux_loss)


class _ZeroGate(LinearGate):
    """A linear map of zeros, which stays so when its values are reset."""

    def reset_parameters(self) -> None:
        # Drawn first as in any linear map: from the same seed, the other layers are what they are with other routers.
        super().reset_parameters()
        nn.init.zeros_(self.weight)


def smooth_load_loss(
    clean_TE: Tensor, noisy_TE: Tensor, width_TE: Tensor, top_k: int, token_mask: Tensor | None = None
) -> Tensor:
    """CV² of the experts' expected loads, each under another noise; without coefficient.

    Args:
        clean_TE: (T, E) logits without noise.
        noisy_TE: (T, E) logits with it.
        width_TE: (T, E) standard deviations of the noise, above 0.
        top_k: K.
        token_mask: (T,) bool, True for real tokens. 0 (with a gradient of 0) if there is none.
    """
    if top_k == noisy_TE.shape[1]:  # every token visits every expert, whatever the noise
        return clean_TE.new_zeros(())
    best_TK = torch.topk(noisy_TE, top_k + 1, dim=-1).values
    last_in_T1, first_out_T1 = best_TK[:, -2:].split(1, dim=-1)
    # For an expert among the k, the k-th of the others is the one that comes next.
    threshold_TE = torch.where(noisy_TE > first_out_T1, first_out_T1, last_in_T1)
    chance_TE = torch.special.ndtr((clean_TE - threshold_TE) / width_TE)
    return cv_squared(mean_over_tokens(chance_TE, token_mask))
