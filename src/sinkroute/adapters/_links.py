"""What ties a router's state to a tensor of the model that it is plugged into."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sinkroute.routing.fold import GateFold
from sinkroute.routing.ranks import distribute, undistributed
from sinkroute.routing.router import Router
from sinkroute.routing.serving import Link

__all__ = ["BiasLink", "GateLink", "held_in", "moves_bias"]


class BiasLink(Link):
    """The router's bias is the model's own: that is the one which serves, is saved and is loaded.

    Args:
        router: one that serves with a bias.
        find: gives the model's tensor, of E numbers, of any float dtype and shape, a `DTensor` too. Asked each time:
            wrappers and `to_empty` put others in its place.
    """

    def __init__(self, router: Router, find: Callable[[], Tensor]) -> None:
        self.router, self.find = router, find

    def _ours(self) -> Tensor:
        added = self.router.serving() or self.router.choice_bias()  # with which it serves, if it serves by a top-k
        assert added is not None and added.bias_E is not None  # or there would be no link
        return added.bias_E

    @torch.no_grad()
    def pull(self) -> None:
        theirs, ours_E = self.find().detach(), self._ours()
        if theirs.is_meta:
            return
        theirs_E = undistributed(theirs).flatten()
        # A model in bf16 holds ours rounded; that is no other value, and the finer one stays.
        same_E = theirs_E == ours_E.to(theirs_E.device, theirs_E.dtype)
        ours_E.copy_(torch.where(same_E.to(ours_E.device), ours_E, theirs_E.to(ours_E.device, ours_E.dtype)))

    @torch.no_grad()
    def push(self) -> None:
        theirs = self.find()
        ours = self._ours().to(theirs.device, theirs.dtype).view(theirs.shape)
        theirs.copy_(distribute(ours, theirs) if hasattr(theirs, "device_mesh") else ours)


class GateLink(GateFold):
    """The router's potentials go into the gate, and into the copy of it that an optimiser keeps.

    Args:
        router, owner, name: see `GateFold`.
        move_copy: adds the second tensor to the optimiser's copy of the first, a parameter that has not been moved yet,
            in the copy's precision. Says whether there is one, on whatever rank: it is what the weights become.
    """

    def __init__(
        self, router: Router, owner: nn.Module, name: str, move_copy: Callable[[Tensor, Tensor], bool]
    ) -> None:
        super().__init__(router, owner, name)
        self.move_copy, self._is_sharded = move_copy, False

    def add(self, moved: Tensor, move: Tensor) -> Tensor:
        if self._is_sharded and not hasattr(moved, "device_mesh"):
            raise RuntimeError(
                f"{type(self.router).__name__} moves {self.name}, which FSDP has gathered for a forward pass and will "
                "gather anew, so that the move would be lost; call sinkroute.end_step after the optimiser's step, "
                "before any other pass"
            )
        self._is_sharded = hasattr(moved, "device_mesh")
        has_copy = self.move_copy(moved, move)
        taken = super().add(moved, move)
        return move if has_copy else taken


def moves_bias(router: Router) -> bool:
    """Whether the router's bias is that of the model."""
    return any(isinstance(link, BiasLink) for link in router.links)


def held_in(router: Router) -> list[str]:
    """Where of the model is what the router serves with, for descriptions; empty: nowhere but in the router."""
    if moves_bias(router):
        return ["its bias is the layer's"]
    return ["folded into the gate"] if router.links else []
