"""Vanilla sparse MoE: the K largest scores, weighted by their softmax (arXiv 1701.06538, without its noise)."""

from __future__ import annotations

from sinkroute.routing.router import Router

__all__ = ["SoftmaxRouter"]


class SoftmaxRouter(Router):
    """Plain top-k in training as when serving, and no loss: the baseline that lets experts die.

    >>> import torch, sinkroute
    >>> router = sinkroute.create_router("softmax", num_experts=4, top_k=2)
    >>> routes = router(torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 0.0, 0.0, 1.0]]))
    >>> routes.experts.tolist(), routes.load.tolist()
    ([[1, 2], [0, 3]], [1, 1, 1, 1])
    """
