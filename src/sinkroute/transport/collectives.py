"""The collective calls that sinkroute makes: made here, counted here, and with an error that helps if a rank is lost.

The words of the ledger, for a group of N ranks, two or more (a rank that is alone makes no call):

- A *collective* is one call that all ranks of a group make together.
- *Bytes* are those of the numbers that this rank hands to it: 8 for a float64.
- *Messages* are what this rank sends in a ring: N − 1 for `all_gather`, each of all its bytes, and 2 (N − 1) for
  `all_reduce`, each of an N-th of them. So on the wire they are (N − 1) · bytes, and 2 (N − 1) / N · bytes. A backend
  may send otherwise, along trees for example.

Counted is on the host, as calls are made: no device is waited for. What a compiled graph has taken up is not seen.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sinkroute._errors import RankLost

__all__ = ["Account", "Sent", "all_gather", "all_reduce", "counted", "sent"]


class Sent(NamedTuple):
    """What this rank has taken part in; see the module.

    >>> Sent(2, 6, 96) + Sent(1, 3, 8), Sent(2, 6, 96) - Sent(1, 3, 8)
    (Sent(collectives=3, messages=9, bytes=104), Sent(collectives=1, messages=3, bytes=88))
    """

    collectives: int = 0
    messages: int = 0
    bytes: int = 0

    def __add__(self, other: Any) -> Sent:
        return Sent(*(x + y for x, y in zip(self, other, strict=True)))

    def __sub__(self, other: Sent) -> Sent:
        return Sent(*(x - y for x, y in zip(self, other, strict=True)))


_sent = Sent()


def sent() -> Sent:
    """What this process has sent by sinkroute's collective calls since it began: what lies between two is theirs."""
    return _sent


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x` summed over the ranks, in place.

    Raises:
        RankLost: another rank has gone, or did not come within the time limit, and the backend says so.
    """
    if torch.compiler.is_compiling():
        dist.all_reduce(x, group=group)
        return x
    with counted("all_reduce", x, group, 2 * (dist.get_world_size(group) - 1)):
        dist.all_reduce(x, group=group)
    return x


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, *shape): `x` of every rank.

    Raises:
        RankLost: see `all_reduce`.
    """
    ranks = dist.get_world_size(group)
    gathered = x.new_empty((ranks, *x.shape))
    with counted("all_gather", x, group, ranks - 1):
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=group)
    return gathered


@contextlib.contextmanager
def counted(call: str, x: Tensor, group: dist.ProcessGroup, messages: int) -> Iterator[None]:
    """Book a collective call of this rank, which is made in it, and say whose it was if it fails.

    Args:
        call: its name.
        x: what this rank hands to it.
        group: of the ranks that make it together.
        messages: how many this rank sends.
    """
    global _sent
    _sent += Sent(1, messages, x.numel() * x.element_size())
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        what = f"in {call} of {x.numel()} numbers ({str(x.dtype).removeprefix('torch.')})"
        raise RankLost(f"{_who(error, x, group)} {what}; {_GO_ON}") from error


class Account:
    """What is sent within it, `with account: ...`, again and again.

    Attributes:
        times: how often that was.
        sent: in all.
    """

    def __init__(self) -> None:
        self.times, self.sent, self._before = 0, Sent(), Sent()

    def now(self) -> tuple[int, Sent]:
        return self.times, self.sent

    def __enter__(self) -> None:
        self._before = sent()

    def __exit__(self, *_: object) -> None:
        # Also when an error leaves it: a repetition of a pass for activation checkpointing is cut off by one.
        self.times += 1
        if (now := sent()) is not self._before:
            self.sent += now - self._before


# -- who is lost -------------------------------------------------------------------------------------------------------

_GO_ON = "restart the job: it continues from its last checkpoint"
_TOO_LATE = re.compile("timed? ?out", re.IGNORECASE)
# What gloo says, and NCCL where it raises an error at all.
_LOST = re.compile(
    r"timed? ?out|connection (closed|reset|refused|was)|broken pipe|not connected|pair closure|socket|aborted|"
    r"(read|write) error",
    re.IGNORECASE,
)


def _who(error: RuntimeError, x: Tensor, group: dist.ProcessGroup) -> str:
    ranks = dist.get_process_group_ranks(group)
    if _TOO_LATE.search(str(error)):
        # Which one cannot be told: its neighbours in the ring wait for it, and theirs for them.
        return f"a rank of {ranks} did not answer within the time limit,"
    gone = _gone(ranks, x, group)
    if not gone:
        return f"a rank of {ranks} no longer answers"
    if len(gone) == 1:
        return f"rank {gone[0]} of {ranks} no longer answers"
    return f"ranks {', '.join(map(str, gone))} of {ranks} no longer answer"


def _gone(ranks: list[int], x: Tensor, group: dist.ProcessGroup) -> list[int]:
    """The ranks whose connection is closed, to whom a message fails at once; the later ones perhaps for the first."""
    if x.device.type != "cpu" or "gloo" not in str(dist.get_backend(group)):
        return []
    gone = []
    for rank in ranks:
        if rank != dist.get_rank():
            try:
                dist.isend(x.new_zeros(1), rank, group=group)
            except RuntimeError:
                gone.append(rank)
    return gone
