"""XMoE: scores on a low-dimensional hypersphere (Chi et al., arXiv 2204.09179, section 3.2).

    z_ij = cos(W x_i, e_j) / τ,    W: D → E/2,    τ learned, 0.3 at first

A dot product pulls tokens towards the experts' embeddings, in a space of as many dimensions as there are experts; the
paper calls that collapse. A cosine in few dimensions pulls less. Then softmax top-k with the load-balancing loss of the
Switch Transformer, coefficient 0.01.

Of the released code (microsoft/torchscale) these are other: there the projection has 16 dimensions, the tokens' side is
not normalised, and there is no temperature. What is here is the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkroute.routing.card import Card
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.orthogonal import fill_orthogonal
from sinkroute.routing.router import Router

__all__ = ["CosineGate", "XMoERouter"]

# Both are those of the released code.
_LEAST_TEMPERATURE = 1e-4
_LEAST_NORM = 1e-4


class CosineGate(nn.Module):
    """Tokens (T, D) to logits (T, E): the cosine of a projected token and each expert's embedding, over a temperature.

    Args:
        d_model: D.
        num_experts: E.
        dim: of the projection.
        temperature: τ at first.

    Attributes:
        project: the projection, (dim, D), without bias.
        embeddings: (E, dim).
        temperature: 0-d. Below 10⁻⁴ it acts as 10⁻⁴, with the gradient that it has there.
    """

    @torch.inference_mode(False)  # it is to be trained, wherever it is made
    def __init__(self, d_model: int, num_experts: int, dim: int, temperature: float) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, dim, bias=False)
        self.embeddings = nn.Parameter(torch.empty(num_experts, dim))
        self.temperature = nn.Parameter(torch.empty(()))
        self._initial_temperature = float(temperature)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings as in the released code, the temperature that was given. (The projection resets itself.)"""
        fill_orthogonal(self.embeddings, gain=0.32)
        nn.init.constant_(self.temperature, self._initial_temperature)

    def forward(self, x_TD: Tensor) -> Tensor:
        # In the dtype of the tokens, which the layer has lifted to float32: a gate in low precision is lifted too.
        dtype = x_TD.dtype
        tokens_TP = F.normalize(F.linear(x_TD, self.project.weight.to(dtype)), dim=-1, eps=_LEAST_NORM)
        experts_EP = F.normalize(self.embeddings.to(dtype), dim=-1, eps=_LEAST_NORM)
        # Clamped in value alone: the gradient of a clamp is 0 below its bound, and τ would never come back.
        learned = self.temperature.to(dtype)
        temperature = learned.detach().clamp(min=_LEAST_TEMPERATURE) + (learned - learned.detach())
        return tokens_TP @ experts_EP.t() / temperature


class XMoERouter(Router):
    """Top-k with a gate of cosines, and the load-balancing loss.

    The cosines are in the gate (`make_gate`). Given the logits of another gate, the router is plain top-k with the
    load-balancing loss: `"load-balance"` with this coefficient.

    >>> import sinkroute
    >>> gate = sinkroute.create_router("xmoe", num_experts=16, top_k=2).make_gate(d_model=64)
    >>> gate.project.weight.shape, bool((gate(torch.randn(10, 64)).abs() <= 1 / 0.3 + 1e-4).all())
    (torch.Size([8, 64]), True)
    """

    card = Card("yes", "yes", "top-k of cosines and a loss")
    serves_any_gate = False
    own_losses: ClassVar = {"load-balance": "coefficient"}

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        dim: int | None = option(
            None,
            "of the gate's projection. None: half of E, rounded up, and 2 at least: on a line a cosine is 1 or −1 and "
            "learns nothing",
            least=1,
        )
        temperature: float = option(0.3, "τ at first", least=_LEAST_TEMPERATURE, published=True)
        coefficient: float = option(0.01, "of the loss", least=0, published=True)

    def make_gate(self, d_model: int) -> nn.Module:
        """A `CosineGate`."""
        dim = max(2, math.ceil(self.num_experts / 2)) if self.dim is None else self.dim
        return CosineGate(d_model, self.num_experts, dim, self.temperature)
