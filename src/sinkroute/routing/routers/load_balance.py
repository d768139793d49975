"""Top-k with the load-balancing loss of the Switch Transformer (arXiv 2101.03961); see `losses/load_balance.py`."""

from __future__ import annotations

from typing_extensions import Unpack

from sinkroute.routing.router import CommonOptions, Router

__all__ = ["LoadBalanceRouter"]


class LoadBalanceRouter(Router):
    """Top-k with the Switch load-balancing loss, per micro-batch.

    Args:
        coefficient: of the loss; 0.01 is the published value (arXiv 2101.03961, section 2.2).
        common: see `Router`.
    """

    def __init__(
        self, num_experts: int, top_k: int, *, coefficient: float = 0.01, **common: Unpack[CommonOptions]
    ) -> None:
        super().__init__(num_experts, top_k, **common)
        self.coefficient = coefficient
        self.add_loss("load-balance", coefficient)
