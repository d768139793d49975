"""Top-k with the router z-loss of ST-MoE (arXiv 2202.08906); see `losses/z_loss.py`."""

from __future__ import annotations

from typing_extensions import Unpack

from sinkroute.routing.router import CommonOptions, Router

__all__ = ["ZLossRouter"]


class ZLossRouter(Router):
    """Top-k with the router z-loss.

    Args:
        coefficient: of the loss; 0.001 is the published value (arXiv 2202.08906, section 3.3).
        common: see `Router`.
    """

    def __init__(
        self, num_experts: int, top_k: int, *, coefficient: float = 1e-3, **common: Unpack[CommonOptions]
    ) -> None:
        super().__init__(num_experts, top_k, **common)
        self.coefficient = coefficient
        self.add_loss("z-loss", coefficient)
