"""Sums over the ranks of a data-parallel group."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from sinkroute.routing.draws import hash63

__all__ = ["Group", "Ranks", "distribute"]

if TYPE_CHECKING:
    Group: TypeAlias = dist.ProcessGroup | Literal["world"] | "Ranks" | None
else:
    Group = Any  # torch may be built without ProcessGroup


# Of each process group, the sizes on which its ranks have agreed.
_alike: MutableMapping[Any, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()


class Ranks:
    """A process group that a module can hold: copies of the module share it, as they must.

    Args:
        group: a `ProcessGroup`, `"world"` for all ranks, or None for this rank alone. Without an initialised process
            group all of them are this rank alone.

    Raises:
        TypeError: it is something else.
    """

    def __init__(self, group: Group) -> None:
        self._group: Any = group._group if isinstance(group, Ranks) else group
        known = self._group is None or (isinstance(self._group, str) and self._group == "world")
        if not known and not (dist.is_available() and isinstance(self._group, dist.ProcessGroup)):
            raise TypeError(
                f'process_group must be a ProcessGroup, "world" or None, got {self._group!r}; '
                "make one with torch.distributed.new_group(ranks), or take mesh.get_group(name) of a device mesh"
            )

    @property
    def group(self) -> dist.ProcessGroup | None:
        """For collectives; None where this rank is alone."""
        if self._group is None or not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self._group == "world" else self._group
        return group if dist.get_world_size(group) > 1 else None

    @property
    def rank(self) -> int:
        """Of this process in the group; 0 where it is alone."""
        if self._group is None or not (dist.is_available() and dist.is_initialized()):
            return 0
        return dist.get_rank(None if self._group == "world" else self._group)

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place."""
        if (group := self.group) is not None:
            dist.all_reduce(values, group=group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """`values` of every rank, (ranks, *shape); of this one where it is alone."""
        if (group := self.group) is None:
            return values[None]
        found = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, values, group=group)
        return torch.stack(found)

    def require_alike(self, sizes: Sequence[int], device: torch.device, what: str) -> None:
        """Refuse sizes that differ between the ranks, on all of them, before a call that would wait for ever.

        A collective call, of which only the first with these sizes asks.

        Args:
            sizes: what has to be equal.
            device: whose tensors the group takes.
            what: the sizes are of, for the message: what each rank has, and the cure.

        Raises:
            ValueError: they differ.
        """
        if (group := self.group) is None:
            return
        known, own = _alike.setdefault(group, set()), tuple(sizes)
        if own in known:
            return
        # Of fixed length, or this call would be what it guards against. A hash of 62 bits and a sign fits an int64.
        mine = torch.tensor([len(own), sum(own), hash63("alike", *own)], device=device)
        rows = self.gather(mine).tolist()
        if any(row != rows[0] for row in rows):
            told = ", ".join(
                f"{count} with {sum_} numbers on rank {rank}" for rank, (count, sum_, _) in enumerate(rows)
            )
            raise ValueError(f"{what}, got {told}")
        known.add(own)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __repr__(self) -> str:
        return repr(self._group)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranks) and self._group == other._group

    def __hash__(self) -> int:
        return hash(self._group)


def distribute(values: Tensor, like: Tensor) -> Tensor:
    """`values`, the same on all ranks, in the mesh and the placements of `like`, a `DTensor`. A collective call."""
    from torch.distributed.tensor import distribute_tensor  # half a second that only sharded models need

    sharded: Any = like
    return distribute_tensor(values.to(sharded.device), sharded.device_mesh, sharded.placements)
