"""Top-k with the load-balancing loss of the global batch (arXiv 2501.11873); see `losses/global_load_balance.py`."""

from __future__ import annotations

from typing_extensions import Unpack

from sinkroute.routing.router import CommonOptions, Router

__all__ = ["GlobalLoadBalanceRouter"]


class GlobalLoadBalanceRouter(Router):
    """Top-k with the load-balancing loss whose f is over all ranks and the micro-batches of the step so far.

    Args:
        coefficient: of the loss; 0.01 is the published value (arXiv 2501.11873, section 4.1).
        common: see `Router`.
    """

    needs_step = True  # or no micro-batch knows of those before

    def __init__(
        self, num_experts: int, top_k: int, *, coefficient: float = 0.01, **common: Unpack[CommonOptions]
    ) -> None:
        super().__init__(num_experts, top_k, **common)
        self.coefficient = coefficient
        self.add_loss("global-load-balance", coefficient)
