"""sinkroute: balanced mixture-of-experts routing for PyTorch, without auxiliary losses.

solve           scores -> transport plan with balanced experts
balanced_topk   scores -> k experts per token, with balanced loads
create_router   scores -> routes, by SSR or by a method it is compared with
MoE             tokens -> tokens, a layer with any of these routers
MultiHeadMoE    the same on parts of tokens
set_step        tells all routers of a model which training step it is
end_step        brings what routers remember up to date with the step that is over
no_balancing    passes in train() that are no training: routed as when serving, counted nowhere
LoadMonitor     counts what the routers of a model do: load, balance, plans, in training and serving
patch           puts a router into a Hugging Face model, in place, and takes it out again
set_inference   what SSR routers do when serving: plain top-k, noise, a plan, or both
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkroute._lazy import lazily

if TYPE_CHECKING:
    from sinkroute.adapters.hf import patch
    from sinkroute.moe import MoE, MultiHeadMoE
    from sinkroute.routing import (
        LoadMonitor,
        Router,
        Routes,
        create_router,
        end_step,
        list_routers,
        no_balancing,
        set_inference,
        set_step,
    )
    from sinkroute.transport import Plan, balanced_topk, solve

__version__ = "0.2.0"

__all__ = [
    "LoadMonitor",
    "MoE",
    "MultiHeadMoE",
    "Plan",
    "Router",
    "Routes",
    "balanced_topk",
    "create_router",
    "end_step",
    "list_routers",
    "no_balancing",
    "patch",
    "set_inference",
    "set_step",
    "solve",
]

# Loaded when first asked for: `sinkroute --help` needs no torch, the command line sets OpenMP up before torch comes.
__getattr__ = lazily(
    __name__,
    {
        "LoadMonitor": "routing",
        "MoE": "moe",
        "MultiHeadMoE": "moe",
        "Plan": "transport",
        "Router": "routing",
        "Routes": "routing",
        "balanced_topk": "transport",
        "create_router": "routing",
        "end_step": "routing",
        "list_routers": "routing",
        "no_balancing": "routing",
        "patch": "adapters.hf",
        "set_inference": "routing",
        "set_step": "routing",
        "solve": "transport",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
