"""The running average of a model's weights over its steps."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["RunningAverage"]


class RunningAverage:
    """An exponential average of the parameters; buffers (what routers remember) are those of the last step.

    Args:
        decay: how much of the average a step leaves.
        module: what holds the average, laid out like the model; it begins as the model does.

    Attributes:
        count: steps averaged; the first one is taken as it is.
    """

    def __init__(self, decay: float, module: nn.Module) -> None:
        self.module, self.count = module, 0
        self._mix = get_ema_multi_avg_fn(decay)

    @classmethod
    def of(cls, model: nn.Module, decay: float) -> RunningAverage:
        """Of a model that this process holds whole."""
        return cls(decay, copy.deepcopy(model))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights that a step left."""
        kept = [_here(parameter) for parameter in self.module.parameters()]
        new = [_here(parameter) for parameter in model.parameters()]
        if self.count == 0:
            torch._foreach_copy_(kept, new)
        else:
            self._mix(kept, new, self.count)
        for buffer, other in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(other)
        self.count += 1


def _here(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that lies in this process; all of it unless it is sharded."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
