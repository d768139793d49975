"""Which ranks share what: whose tokens a plan balances, whose loads are counted, who draws the same noise."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from sinkroute.routing.draws import hash63
from sinkroute.transport.collectives import all_gather, all_reduce, counted

__all__ = ["Group", "Ranks", "RouterRanks", "distribute", "undistributed"]

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = dist.ProcessGroup | DeviceMesh | str | "Ranks" | None
else:
    Group = Any  # torch may be built without ProcessGroup


# Of each process group, the sizes on which its ranks have agreed.
_alike: MutableMapping[Any, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()


class Ranks:
    """A process group that a module can hold: copies of the module share it, as they must.

    Args:
        group: a `ProcessGroup`, `"world"` for all ranks, a `DeviceMesh` of one dimension, or None for this rank alone.
            Without an initialised process group all of these are this rank alone. Any other name is that of a
            dimension of the mesh that the model is spread over (`"loss"`, `"dp_cp"`); an adapter that knows the mesh
            puts the group in its place.

    Attributes:
        name: the dimension whose group is not known yet, or None.

    Raises:
        TypeError: it is something else.
        ValueError: a mesh of several dimensions.

    >>> Ranks("dp_cp").name, Ranks("world").name
    ('dp_cp', None)
    """

    def __init__(self, group: Group) -> None:
        self._group: Any = group._group if isinstance(group, Ranks) else group
        if self._group is None or (isinstance(self._group, str) and self._group):
            return
        if hasattr(self._group, "mesh_dim_names"):  # not by its class: that is half a second of imports
            self._group = _of_mesh(self._group)
        if not (dist.is_available() and isinstance(self._group, dist.ProcessGroup)):
            raise TypeError(
                f'process_group must be a ProcessGroup, "world", the name of a mesh dimension or None, got '
                f"{self._group!r}; make one with torch.distributed.new_group(ranks), or take mesh.get_group(name) of a "
                "device mesh"
            )

    @property
    def name(self) -> str | None:
        return self._group if isinstance(self._group, str) and self._group != "world" else None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """For collectives; None where this rank is alone.

        Raises:
            ValueError: the name of a mesh dimension, and no adapter has put a group in its place.
        """
        if (known := self._known()) is None:
            return None
        return known if dist.get_world_size(known) > 1 else None

    @property
    def rank(self) -> int:
        """Of this process in the group; 0 where it is alone."""
        return 0 if (known := self._known()) is None else dist.get_rank(known)

    def _known(self) -> Any:
        if self.name is not None:
            raise ValueError(
                f"process_group={self.name!r} names a dimension of a device mesh, and no mesh is known here; give the "
                f'group itself, mesh.get_group({self.name!r}), or "world" for all ranks'
            )
        if self._group is None or not (dist.is_available() and dist.is_initialized()):
            return None
        return dist.group.WORLD if self._group == "world" else self._group

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place."""
        if (group := self.group) is not None:
            all_reduce(values, group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """`values` of every rank, (ranks, *shape); of this one where it is alone."""
        if (group := self.group) is None:
            return values[None]
        return all_gather(values, group)

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


class RouterRanks(NamedTuple):
    """The ranks of a router, by what they share.

    Attributes:
        plan: whose tokens a plan balances together.
        load: whose loads are counted together, over a batch: all that have this layer, and other tokens for it. A token
            that several ranks hold is counted once.
        noise: whose tokens differ. A rank draws by its place among these; ranks outside hold the same tokens as one of
            them (tensor parallelism), and draw the same.
    """

    plan: Ranks
    load: Ranks
    noise: Ranks

    @classmethod
    def of(cls, process_group: Group) -> RouterRanks:
        """What an option says: a group is all three. None: a plan is of one rank; all ranks have other tokens."""
        plan = Ranks(process_group)
        others = Ranks("world") if plan == Ranks(None) else plan
        return cls(plan, others, others)


def _of_mesh(mesh: Any) -> Any:
    if mesh.ndim != 1:
        raise ValueError(
            f"process_group is a device mesh of {mesh.ndim} dimensions, {mesh.mesh_dim_names}; give one of them, "
            "mesh[name], or several as one, mesh[names]._flatten()"
        )
    return mesh.get_group()


def distribute(values: Tensor, like: Tensor) -> Tensor:
    """`values`, the same on all ranks, in the mesh and the placements of `like`, a `DTensor`. Every rank cuts its part
    out of what it has: nobody has to talk."""
    from torch.distributed.tensor import distribute_tensor  # half a second that only sharded models need

    sharded: Any = like
    return distribute_tensor(values.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def undistributed(tensor: Tensor) -> Tensor:
    """All of a `DTensor`, on every rank; another tensor as it is.

    A collective call for each dimension of its mesh over which it is cut.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    sharded: Any = tensor
    part, mesh = sharded.to_local(), sharded.device_mesh
    with contextlib.ExitStack() as calls:
        for dim, placement in enumerate(sharded.placements):
            if mesh.size(dim) > 1 and not placement.is_replicate():
                calls.enter_context(counted("full_tensor", part, mesh.get_group(dim), mesh.size(dim) - 1))
        whole: Tensor = sharded.full_tensor()
    return whole
