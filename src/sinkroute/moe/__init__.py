"""The mixture-of-experts layer: a gate, a router, experts, and a dispatch that drops nothing.

Shape suffixes: `T` tokens, `E` experts, `K` experts per token, `D` model width, `F` hidden width of an expert, `R`
routed copies of tokens (T·K).
"""

from sinkroute.moe.layer import MoE
from sinkroute.moe.multi_head import MultiHeadMoE

__all__ = ["MoE", "MultiHeadMoE"]
