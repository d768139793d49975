"""Expert choice: experts choose tokens (Zhou et al., arXiv 2202.09368, section 3.2).

    s = softmax(z) over the experts;    each expert takes the T·c/E tokens with its largest s;    weight = s_ij

so that loads are equal by construction. A token gets c experts on average: some get more, some none. The weights are
not renormalised.

Which tokens an expert takes depends on the whole batch, later tokens included, so that no autoregressive model can be
served like this: serving falls back to the top-k of each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkroute.kernels.operations import uncompiled
from sinkroute.routing.card import Card
from sinkroute.routing.expert_side import take_best_tokens
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.scores import scores

__all__ = ["ExpertChoiceRouter"]


class ExpertChoiceRouter(Router):
    """Each expert takes its best tokens.

    In training the routes have as many columns as the most wanted token has experts, K at least; places beyond a
    token's experts have weight 0 and are not counted in the load. Here `norm_topk=None` means no: the weights are those
    of the paper. Without groups.

    Raises:
        TypeError, ValueError: `capacity_factor` is no number, 0 or less, or above E.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("expert-choice", num_experts=2, top_k=1)
    >>> routes = router(torch.tensor([[3.0, 0.0], [0.0, 2.0], [2.0, 0.0], [1.0, 0.0]]))  # two tokens for each expert
    >>> routes.load.tolist(), (routes.weights > 0).flatten().tolist()
    ([2, 2], [True, True, True, True])
    """

    card = Card("exact", "no", "the best tokens of every expert")
    renormalises = False
    keeps_groups = False

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        capacity_factor: float | None = option(
            None, "c, experts that a token gets on average in training. None: top_k", above=0
        )

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(num_experts, top_k, **options)
        if self.capacity_factor is not None and self.capacity_factor > num_experts:
            raise ValueError(
                f"capacity_factor must be above 0 and at most num_experts={num_experts}, got {self.capacity_factor}; "
                "it is how many experts a token gets on average"
            )

    @uncompiled  # as a whole: one break of the graph, not several
    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        per_token = self.top_k if self.capacity_factor is None else self.capacity_factor
        values_TE = scores(logits_TE.detach(), self.score)
        experts_TK, chosen_TK = take_best_tokens(values_TE, per_token, token_mask, self.top_k, self.tie_seed())
        weights_TK = scores(logits_TE, self.score).gather(1, experts_TK) * chosen_TK
        if self.norm_topk:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)
        return Routes(experts_TK, weights_TK, branch="expert-choice", chosen=chosen_TK)
