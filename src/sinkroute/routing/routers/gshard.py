"""Top-k with the load-balancing loss of GShard (arXiv 2006.16668); see `losses/gshard.py`.

GShard also bounds what an expert takes (its capacity) and therefore sends a token to its second expert by chance only,
with probability proportional to that one's weight. Here nothing is dropped, so there is nothing to save: every token
visits all its experts.
"""

from __future__ import annotations

from typing_extensions import Unpack

from sinkroute.routing.router import CommonOptions, Router

__all__ = ["GShardRouter"]


class GShardRouter(Router):
    """Top-k with GShard's loss, per micro-batch: balances first choices. GShard has `top_k=2`.

    Args:
        coefficient: of the loss, whose scale makes perfect balance cost 1 · coefficient; 0.01 is the usual value.
        common: see `Router`.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("gshard", num_experts=2, top_k=2)
    >>> routes = router(torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log())  # 0.01 · 2 · (1 · 3/4 + 0 · 1/4)
    >>> round(routes.aux_loss.item(), 6), routes.load.tolist()
    (0.015, [2, 2])
    """

    def __init__(
        self, num_experts: int, top_k: int, *, coefficient: float = 0.01, **common: Unpack[CommonOptions]
    ) -> None:
        super().__init__(num_experts, top_k, **common)
        self.coefficient = coefficient
        self.add_loss("gshard", coefficient)
