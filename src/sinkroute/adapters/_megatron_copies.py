"""The float32 copy that Megatron's optimisers keep of a gate in low precision, which has to be moved with the gate."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from sinkroute.routing import Router

__all__ = ["move_main_param"]

# Of each group of ranks, the step that it was asked in last, and whether any of them had a copy.
_asked: MutableMapping[Any, tuple[int, bool]] = weakref.WeakKeyDictionary()


def move_main_param(router: Router, weight: Tensor, move: Tensor) -> bool:
    """Add `move` to the float32 copy of a gate in low precision, which Megatron's optimisers write over it.

    Raises:
        ValueError: the copy is kept where it cannot be found, or in a part that cannot be told.
    """
    if weight.dtype == torch.float32 or not hasattr(weight, "main_param"):
        return False
    main, move_X, weight_X = weight.main_param, move.flatten(), weight.detach().flatten()
    size = 0 if main is None else main.numel()
    if getattr(weight, "main_param_sharded", False) and not _is_somewhere(router, size, weight.device):
        raise ValueError(
            f"{type(router).__name__} moves the gate, and the optimiser keeps a float32 copy of that where it "
            "cannot be found; set use_precision_aware_optimizer=False, or take a method that leaves the gate "
            'alone, such as "ssr-l"'
        )
    if main is None:  # it is on other ranks
        return True
    # A rank of a distributed optimiser has all of it, its beginning or its end.
    places = {0, weight_X.numel() - size}
    found = [at for at in places if torch.equal(weight_X[at : at + size], main.detach().flatten().to(weight.dtype))]
    if len(found) != 1:
        raise ValueError(
            f"{type(router).__name__} moves the gate, and of the optimiser's float32 copy this rank has {size} numbers "
            f"of {weight_X.numel()}, which are not the gate's first or last; take use_distributed_optimizer=False, "
            'or a method that leaves the gate alone, such as "ssr-l"'
        )
    main.detach().view(-1).add_(move_X[found[0] : found[0] + size].to(main.device, main.dtype))
    return True


def _is_somewhere(router: Router, size: int, device: torch.device) -> bool:
    """Whether any rank of the layer has a copy. Where copies are is the optimiser's way with all gates, so that the
    first one of a step that is moved asks for all of its stage: one all-reduce of 8 bytes."""
    group, step = router.ranks.load.group, router.step
    if group is None:
        return bool(router.ranks.load.sum(torch.tensor(size)) > 0)
    known = _asked.get(group)
    if known is None or known[0] != step:
        known = step, bool(router.ranks.load.sum(torch.tensor(size, device=device)) > 0)
        _asked[group] = known
    return known[1]
