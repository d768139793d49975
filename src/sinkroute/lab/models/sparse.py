"""What every model of the lab has: mixtures to look at, an auxiliary loss to add, parameters to count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sinkroute.moe import MoE, MultiHeadMoE

__all__ = ["ParameterCount", "SparseModel"]


class ParameterCount(NamedTuple):
    """Parameters in all, those that one token meets, and those of one mixture layer, its gate included."""

    total: int
    active: int
    per_moe: int


class SparseModel(nn.Module):
    """A model with mixtures of experts in it."""

    _no_split_modules = ("_Block",)
    """What FSDP shards as one, by Accelerate's name for it."""

    @property
    def moe_layers(self) -> list[MoE]:
        """The mixture layers, first to last; of a multi-head mixture the one in its middle."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def auxiliary_loss(self) -> Tensor | None:
        """The sum of the routers' losses in the last forward pass, coefficients included; None if no router has one."""
        routes = [layer.routes for layer in self.moe_layers]
        losses = [route.aux_loss for route in routes if route is not None and route.aux_loss is not None]
        return torch.stack(losses).sum() if losses else None

    def count_parameters(self) -> ParameterCount:
        """Exact counts, on any device, meta too. Of E experts a token meets K, or h·K where it is split in h parts.

        `per_moe` is of the last mixture layer; all are alike.
        """
        total = _numbers(self)
        idle = 0
        for layer, parts in self._mixtures():
            experts = layer.router.num_experts
            met = min(parts * layer.router.top_k, experts)
            idle += _numbers(layer.experts) * (experts - met) // experts
        blocks = [module for module in self.modules() if isinstance(module, (MoE, MultiHeadMoE))]
        # A multi-head mixture comes before the mixture in its middle, which is not another layer.
        inner = {id(block.moe) for block in blocks if isinstance(block, MultiHeadMoE)}
        outer = [block for block in blocks if id(block) not in inner]
        return ParameterCount(total, total - idle, _numbers(outer[-1]) if outer else 0)

    def _mixtures(self) -> list[tuple[MoE, int]]:
        """Each mixture layer, with the number of parts that it sees of a token."""
        heads = {id(module.moe): module.heads for module in self.modules() if isinstance(module, MultiHeadMoE)}
        return [(layer, heads.get(id(layer), 1)) for layer in self.moe_layers]


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
