"""BASE: a balanced assignment in every training step (Lewis et al., arXiv 2103.16716, section 3).

    max Σ_i z_i,a(i)    s.t.    every expert gets the same number of tokens;    weight = sigmoid(z_i,a(i))

The assignment is exact: no other has a larger sum. Where tokens are no multiple of experts, loads differ by one, and it
is the best of all such. Serving is greedy: each token takes its best expert. The paper's layers are top-1; for K > 1 a
token gets K distinct experts, and the sum is over all of them.

An assignment is of one rank's tokens. The paper shuffles tokens over the ranks beforehand; that is not done here. It
looks at the whole batch: while training, a token's expert depends on later tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sinkroute.kernels.operations import uncompiled
from sinkroute.routing.card import Card
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.scores import Score, best_first
from sinkroute.transport import balanced_topk

__all__ = ["BaseRouter"]


class BaseRouter(Router):
    """Experts by balanced assignment, weights by the sigmoid of the logits.

    Here `norm_topk=None` means no: the weights are those of the paper. Without groups.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("base", num_experts=2, top_k=1)
    >>> routes = router(torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 1.0], [3.0, 2.0]]))  # all prefer expert 0
    >>> routes.experts.flatten().tolist(), routes.load.tolist()
    ([0, 0, 1, 1], [2, 2])
    """

    card = Card("exact", "no", "a balanced assignment")
    renormalises = False
    keeps_groups = False

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        score: Score = option("sigmoid", "what the model makes of logits; see the other routers")

    @uncompiled  # which tokens move is known from the data only
    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        values_TE = logits_TE.detach()
        experts_TK = best_first(balanced_topk(values_TE, self.top_k, tol=0, token_mask=token_mask).experts, values_TE)
        return Routes(experts_TK, self.weigh(logits_TE, experts_TK), branch="assignment")
