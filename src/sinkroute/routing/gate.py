"""The linear gate: `nn.Linear` whose bias, if it has one, is 0 at first, also when its values are made anew."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["LinearGate", "add_bias"]


class LinearGate(nn.Linear):
    """Tokens (T, D) to logits (T, E); the weight starts as in `nn.Linear`, a bias at 0.

    Models that come from the meta device get their values from `reset_parameters` of the module that owns them. So what
    is not `nn.Linear`'s own initial value has to be set there, and nowhere else.

    >>> gate = LinearGate(16, 4, bias=True)
    >>> gate.reset_parameters()
    >>> gate.weight.shape, gate.bias.tolist()
    (torch.Size([4, 16]), [0.0, 0.0, 0.0, 0.0])
    """

    @torch.inference_mode(False)  # it is to be trained, wherever it is made
    def __init__(self, d_model: int, num_experts: int, bias: bool = False) -> None:
        super().__init__(d_model, num_experts, bias=bias)

    def _get_name(self) -> str:  # in descriptions: to whom it matters how a gate starts, the class says
        return "Linear"

    def reset_parameters(self) -> None:
        """The weight uniform within 1/√D, the bias 0."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # the draw of nn.Linear
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def add_bias(gate: nn.Linear) -> None:
    """Give a gate a bias of 0, if it has none."""
    if gate.bias is None:
        with torch.inference_mode(False):  # it is to be trained, wherever the layer is made
            gate.bias = nn.Parameter(torch.zeros_like(gate.weight[:, 0]))
