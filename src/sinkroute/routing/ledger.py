"""Whose the collective calls of a pass are: booked on the router, and named where another rank is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sinkroute._errors import RankLost

if TYPE_CHECKING:
    from sinkroute.routing.router import Router

__all__ = ["talking"]


@contextmanager
def talking(router: Router) -> Iterator[None]:
    """What a router sends to other ranks in a pass, it sends in this. Compiled code has it break no graph: it stands in
    what is `uncompiled`."""
    try:
        with router.sent["train" if router.training else "eval"]:
            yield
    except RankLost as lost:
        raise lost.during(f"step {router.step} of layer {router.layer}, {type(router).__name__}") from lost.__cause__
