"""The tokens of a step's plans, kept until the step is over: what all ranks remember is to balance all of them.

Each rank may plan for its tokens alone, and what the method keeps of that has to balance those of all. The mean of the
ranks' potentials does not where ranks see other domains. A pass is no place to ask the other ranks: they may have
another number of micro-batches, be at another layer (pipeline stages) or repeat a pass (activation checkpointing). The
end of a step is: there all ranks take part, once and in the order of the layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinkroute.routing.ranks import RouterRanks
from sinkroute.routing.state import recomputing

__all__ = ["StepTokens", "plans_apart", "potentials_of_all"]


MOST = 1 << 21
"""Numbers that are kept of a layer, 8 MiB. Of 256 experts these are 8192 tokens, which tell a load to some percent."""


def plans_apart(ranks: RouterRanks) -> bool:
    """Whether a plan is of fewer ranks than those whose tokens a method is to balance by what it keeps.

    >>> plans_apart(RouterRanks.of(None))  # in one process
    False
    """
    return ranks.load != ranks.plan and ranks.load.group is not None


class StepTokens:
    """What this rank's plans of one step were made of: all tokens, or where they are many every second, fourth, ...

    Attributes:
        passes: how many were noted since it was asked last.

    >>> tokens = StepTokens()
    >>> tokens.note(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([True, False]))
    >>> tokens.take(num_experts=2, device=torch.device("cpu"))
    tensor([[1., 2.]])
    >>> len(tokens.take(num_experts=2, device=torch.device("cpu")))
    0
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """What was noted is not asked for."""
        self._parts: list[Tensor] = []
        self.passes = 0
        self._every = 1

    def note(self, cost_TE: Tensor, token_mask: Tensor | None) -> None:
        """A pass of the training had a plan of this cost."""
        if recomputing():
            return
        cost_TE = cost_TE.detach() if token_mask is None else cost_TE.detach()[token_mask]
        self._parts.append(cost_TE[:: self._every])
        self.passes += 1
        while sum(part.numel() for part in self._parts) > MOST:
            self._every *= 2
            self._parts = [torch.cat(self._parts)[::2].clone()]  # or the others would stay in memory, too

    def take(self, num_experts: int, device: torch.device) -> Tensor:
        """(N, E) float32, the costs of real tokens since it was asked last; N may be 0."""
        # Of one dtype wherever a rank has none.
        nothing_TE = torch.empty(0, num_experts, dtype=torch.float32, device=device)
        parts = self._parts
        self.forget()
        return torch.cat([nothing_TE, *(part.to(nothing_TE) for part in parts)])


def potentials_of_all(tokens: StepTokens, ranks: RouterRanks, mean_E: Tensor, solve: Callable[..., Tensor]) -> Tensor:
    """The potentials (E,) that balance the tokens of all ranks, for all of them to keep. A collective call.

    Args:
        tokens: of this rank.
        ranks: of the router.
        mean_E: (E,) what is kept where no rank has a token. The search does not start there: where ranks see other
            domains it ended further from balance than from 0 (MaxVio 0.020 against 0.006).
        solve: from costs (N, E) and `process_group` to potentials (E,).
    """
    cost_NE = tokens.take(len(mean_E), mean_E.device)
    found_E = solve(cost_NE, process_group=ranks.load.group).to(mean_E)
    return torch.where(found_E.any(), found_E, mean_E)
