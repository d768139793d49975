"""The router of V-MoE (Riquelme et al., arXiv 2106.05974, section 2 and appendix A.2): a little noise, two losses.

    h_ij = z_ij + ε_ij / E,    ε_ij ~ N(0, 1)

In training the experts are the top-k of h, the weights their scores in h, and

    importance_j = Σ_i s_ij                              s the scores of z, without noise
    load_j       = Σ_i Φ((z_ij − h_i(k)) · E)            h_i(k) the k-th largest h_i
    loss         = importance_coefficient · CV(importance)² + load_coefficient · CV(load)²

Φ is the standard normal distribution function: load_j expects how many tokens would pass their threshold h_i(k) to
expert j if the noise were drawn again. Serving is plain top-k of z.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sinkroute.routing.card import Card
from sinkroute.routing.losses.importance import cv_squared
from sinkroute.routing.masked import mean_over_tokens
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes

__all__ = ["VMoENoiseRouter"]


class VMoENoiseRouter(Router):
    """Top-k of logits with Gaussian noise of standard deviation 1/E, and two losses.

    V-MoE has `norm_topk=False`. Without groups.
    """

    card = Card("yes", "yes", "top-k of noisy logits and two losses")
    needs_step = True
    keeps_groups = False
    own_losses: ClassVar = {"importance": "importance_coefficient"}

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        importance_coefficient: float = option(
            0.005, "of the loss on the experts' total scores", least=0, published=True
        )
        load_coefficient: float = option(0.005, "of the loss on the smooth load", least=0, published=True)

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        noisy_TE = logits_TE + self.draw_normal(logits_TE) / self.num_experts
        threshold_T1 = torch.topk(noisy_TE, self.top_k, dim=-1).values[:, -1:]
        chance_TE = torch.special.ndtr((logits_TE - threshold_T1) * self.num_experts)
        load = cv_squared(mean_over_tokens(chance_TE, token_mask))
        return replace(self.topk(noisy_TE), aux_loss=self.load_coefficient * load)
