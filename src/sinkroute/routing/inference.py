"""How models that were trained with SSR serve: the four modes that the paper compares."""

from __future__ import annotations

from torch import nn

from sinkroute._errors import unknown_name
from sinkroute.routing.attached import named_routers
from sinkroute.routing.routers.ssr import Inference, SSRRouter

__all__ = ["INFERENCE_MODES", "set_inference"]

INFERENCE_MODES = SSRRouter.inference_modes


def set_inference(module: nn.Module, mode: Inference) -> None:
    """Choose what all SSR routers in `module` do in `eval()`; arXiv 2511.08972 finds `"none"` best.

    Args:
        module: a model, a layer or a router.
        mode: `"none"`, plain top-k; `"noise"`, top-k of noisy scores; `"sinkhorn"`, the transport plan over the batch;
            `"both"`, the plan of noisy scores. Noise is that of the router's options, keyed by the last `set_step`.

    Raises:
        ValueError: an unknown mode, or no SSR router in the module: other methods serve in one way only.

    >>> import sinkroute
    >>> router = sinkroute.create_router("ssr-s", num_experts=8, top_k=2).eval()
    >>> sinkroute.set_inference(router, "sinkhorn")
    >>> import torch
    >>> router(torch.randn(16, 8)).branch
    'sinkhorn'
    """
    if mode not in INFERENCE_MODES:
        raise unknown_name("mode", mode, INFERENCE_MODES)
    routers = [router for router in named_routers(module).values() if mode in router.inference_modes]
    if not routers and mode != "none":
        raise ValueError(f"mode={mode!r} is for routers of the SSR family, and {type(module).__name__} holds none")
    for router in routers:
        router.inference = mode
