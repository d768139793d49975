"""The loads of whole optimiser steps, made of passes that the hooks have counted: micro-batches, and several ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkroute.routing.metrics import max_violation
from sinkroute.routing.ranks import Ranks
from sinkroute.routing.watch import Counts

__all__ = ["WholeSteps"]


class WholeSteps:
    """What a monitor knows of steps, in one mode. No device is waited for.

    Args:
        counts: of each layer; they grow with every pass.

    Attributes:
        number: steps that have ended.
        sinkhorn: those of them in which some layer's pass was by the Sinkhorn branch, on this rank.
    """

    def __init__(self, counts: Sequence[Counts]) -> None:
        self.counts = counts
        self.begin()

    def begin(self) -> None:
        """Begin anew."""
        self.number, self.sinkhorn = 0, 0
        self._max_vio_L: Tensor | float = 0.0

    def max_vio(self) -> list[float | None]:
        """MaxVio of each layer, mean over the steps; None without one."""
        if not isinstance(self._max_vio_L, Tensor):
            return [None] * len(self.counts)
        mean: list[float | None] = (self._max_vio_L / self.number).tolist()
        return mean

    @torch.no_grad()
    def end(self, ranks: Ranks) -> list[Tensor]:
        """Close a step; (E,) int64 of each layer: the load of the passes since the last one, summed over the ranks."""
        loads = [each.end_step() for each in self.counts]
        sizes, device = [len(load_E) for load_E in loads], loads[0].device
        ranks.require_alike(sizes, device, "the ranks of process_group must watch the same layers")
        loads = list(ranks.sum(torch.cat([load_E.to(device) for load_E in loads])).long().split(sizes))
        if len(set(sizes)) == 1:
            violation_L = max_violation(torch.stack(loads))
        else:
            violation_L = torch.stack([max_violation(load_E) for load_E in loads])
        before = self._max_vio_L  # of the device on which the model was then
        self._max_vio_L = violation_L + (before.to(device) if isinstance(before, Tensor) else before)
        self.number += 1
        self.sinkhorn += any(each.planned for each in self.counts)
        for each in self.counts:
            each.planned = False
        return loads
