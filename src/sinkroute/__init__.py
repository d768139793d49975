"""sinkroute: balanced mixture-of-experts routing for PyTorch, without auxiliary losses.

solve           scores -> transport plan with balanced experts
create_router   scores -> routes, by SSR or by a method it is compared with
MoE             tokens -> tokens, a layer with any of these routers
set_step        tells all routers of a model which training step it is
"""

from sinkroute.moe import MoE
from sinkroute.routing import Router, Routes, create_router, list_routers, set_step
from sinkroute.transport import Plan, solve

__version__ = "0.1.0"

__all__ = ["MoE", "Plan", "Router", "Routes", "create_router", "list_routers", "set_step", "solve"]
