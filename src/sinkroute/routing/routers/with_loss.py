"""Top-k with one auxiliary loss in training. The losses themselves, with their sources, are in `routing/losses`.

GShard (arXiv 2006.16668) also bounds what an expert takes (its capacity) and therefore sends a token to its second
expert by chance only, with probability proportional to that one's weight. Here nothing is dropped, so there is nothing
to save: every token visits all its experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sinkroute.routing.card import Card
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router

__all__ = ["GShardRouter", "GlobalLoadBalanceRouter", "LoadBalanceRouter", "ZLossRouter"]


class LoadBalanceRouter(Router):
    """Top-k with the load-balancing loss of the Switch Transformer (arXiv 2101.03961), per micro-batch."""

    card = Card("yes", "yes", "top-k and a loss")
    own_losses: ClassVar = {"load-balance": "coefficient"}

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        coefficient: float = option(0.01, "of the loss (section 2.2)", least=0, published=True)


class GShardRouter(Router):
    """Top-k with the loss of GShard (arXiv 2006.16668), per micro-batch: balances first choices. GShard has `top_k=2`.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("gshard", num_experts=2, top_k=2)
    >>> routes = router(torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log())  # 0.01 · 2 · (1 · 3/4 + 0 · 1/4)
    >>> round(routes.aux_loss.item(), 6), routes.load.tolist()
    (0.015, [2, 2])
    """

    card = Card("yes", "yes", "top-k and a loss")
    own_losses: ClassVar = {"gshard": "coefficient"}

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        coefficient: float = option(
            0.01,
            "of the loss, whose scale makes perfect balance cost 1 · coefficient",
            least=0,
            hint="0.01 is the usual value",
        )


class GlobalLoadBalanceRouter(Router):
    """Top-k with the load-balancing loss whose f is over all ranks and the micro-batches of the step so far.

    Qiu et al., arXiv 2501.11873, section 3.
    """

    card = Card("yes", "yes", "top-k and a loss; E numbers over ranks a pass")
    needs_step = True  # or no micro-batch knows of those before
    own_losses: ClassVar = {"global-load-balance": "coefficient"}

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        coefficient: float = option(0.01, "of the loss (section 4.1)", least=0, published=True)


class ZLossRouter(Router):
    """Top-k with the router z-loss of ST-MoE (arXiv 2202.08906)."""

    card = Card("no", "no", "top-k and a loss")
    own_losses: ClassVar = {"z-loss": "coefficient"}

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        coefficient: float = option(1e-3, "of the loss (section 3.3)", least=0, published=True)
