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
        max_vio_L: their MaxVio, summed over them, on the first layer's device.
        sinkhorn: steps in which some layer's pass was by the Sinkhorn branch, on this rank.
    """

    def __init__(self, counts: Sequence[Counts]) -> None:
        self.counts = counts
        self.begin()

    def begin(self) -> None:
        """Begin anew, with what is counted from now on."""
        with torch.inference_mode(False):
            self._seen = [each.all_N.clone() for each in self.counts]
            self.number = 0
            self.max_vio_L = torch.zeros(len(self.counts), dtype=torch.float64, device=self._seen[0].device)
            self.sinkhorn = torch.zeros((), dtype=torch.int64, device=self._seen[0].device)

    def max_vio(self) -> list[float | None]:
        """MaxVio of each layer, mean over the steps; None without one."""
        if not self.number:
            return [None] * len(self.counts)
        mean: list[float | None] = (self.max_vio_L / self.number).tolist()
        return mean

    @torch.no_grad()
    def end(self, ranks: Ranks) -> list[Tensor]:
        """Close a step; (E,) int64 of each layer: the load of the passes since the last one, summed over the ranks."""
        device = self.max_vio_L.device
        passed = [
            (each.all_N - seen.to(each.all_N.device)).to(device)
            for each, seen in zip(self.counts, self._seen, strict=True)
        ]
        self._seen = [each.all_N.clone() for each in self.counts]
        sizes = [each.num_experts for each in self.counts]
        ranks.require_alike(sizes, device, "the ranks of process_group must watch the same layers")
        load = ranks.sum(torch.cat([part_N[:experts] for part_N, experts in zip(passed, sizes, strict=True)]))
        if len(set(sizes)) == 1:
            violation_L = max_violation(load.view(len(sizes), -1))
        else:
            violation_L = torch.stack([max_violation(load_E) for load_E in load.split(sizes)])
        self.number += 1
        self.max_vio_L += violation_L
        at = self.counts[0].names.index("sinkhorn")
        planned = torch.stack([part_N[experts + at] for part_N, experts in zip(passed, sizes, strict=True)])
        self.sinkhorn += planned.any()
        return list(load.long().split(sizes))
