"""Routing: from gating scores to `Routes`, by SSR and by the methods it is compared with.

Shape suffixes, here and in `sinkroute.moe`: `T` tokens, `E` experts, `K` experts per token, `D` model width,
`F` hidden width of an expert, `R` routed copies of tokens (T·K).
"""

from sinkroute.routing.idle import no_balancing
from sinkroute.routing.inference import set_inference
from sinkroute.routing.monitor import LoadMonitor
from sinkroute.routing.registry import create_router, list_routers
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.step import end_step, set_step

__all__ = [
    "LoadMonitor",
    "Router",
    "Routes",
    "create_router",
    "end_step",
    "list_routers",
    "no_balancing",
    "set_inference",
    "set_step",
]
