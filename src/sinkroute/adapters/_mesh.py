"""The ranks of a device mesh by what they hold, told by the names of its dimensions: other tokens or the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from sinkroute.adapters._ranks import UnknownLayout, require_distinct

__all__ = ["MeshRanks", "Named"]

# As torch, accelerate and transformers call them: data parallelism, whole or sharded; and sequences in parts.
_OTHER_TOKENS = frozenset(
    ("dp", "ddp", "fsdp", "hsdp", "dp_replicate", "dp_shard", "replicate", "shard", "data", "data_parallel", "cp", "sp")
)
_SAME_TOKENS = ("tp",)


class Named:
    """A mesh without names, with these."""

    def __init__(self, mesh: Any, names: Sequence[str]) -> None:
        self._mesh, self.mesh, self.mesh_dim_names = mesh, mesh.mesh, tuple(names)

    def get_group(self, name: str) -> Any:
        return self._mesh.get_group(self.mesh_dim_names.index(name))


class MeshRanks:
    """The ranks of a mesh; see `Spread`.

    Args:
        mesh: the whole one, of which others may be slices.
        what: is spread over it, for messages.
        other: more names of dimensions along which ranks hold other tokens.

    Raises:
        UnknownLayout: a dimension that nobody knows, pipeline stages, or ranks that are not in the mesh.
    """

    def __init__(self, mesh: Any, what: str, *, other: Sequence[str] = ()) -> None:
        self._mesh = mesh
        sizes = dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True))
        names = [name for name, size in sizes.items() if size > 1]
        self._what = f"{what} is spread over a device mesh ({', '.join(f'{name}={sizes[name]}' for name in names)})"
        cure = (
            "give process_group=the group of the ranks with other tokens, such as mesh.get_group(name), or name the "
            "dimensions of the mesh as torch does: dp, fsdp, cp, tp"
        )
        if "pp" in names:
            raise UnknownLayout(
                f"{self._what}, and what a router of a pipeline stage is to know of the others is not; leave pp_size "
                "at 1"
            )
        if unknown := [name for name in names if name not in {*_OTHER_TOKENS, *_SAME_TOKENS, *other}]:
            raise UnknownLayout(
                f"{self._what}, and whether ranks along {' and '.join(unknown)} hold the same tokens is not known; "
                f"{cure}"
            )
        if math.prod(sizes.values()) != dist.get_world_size():
            raise UnknownLayout(
                f"{self._what}, in which not all {dist.get_world_size()} ranks are, and what the others hold is not "
                f"known; {cure}"
            )
        self._others = tuple(name for name in names if name not in _SAME_TOKENS)
        self._is_all = len(self._others) == len(names)

    def others(self) -> Any:
        if not self._others:
            return None
        if self._is_all:
            return dist.group.WORLD
        if len(self._others) == 1:
            return self._mesh.get_group(self._others[0])
        wanted = self._along(self._others)
        joint = (mesh.get_group() for mesh in getattr(self._mesh, "_flatten_mapping", {}).values())
        known = (group for group in joint if dist.get_process_group_ranks(group) == wanted)
        return next(known, None) or self._mesh[self._others]._flatten().get_group()

    def named(self, name: str) -> Any:
        joint = getattr(self._mesh, "_flatten_mapping", {})
        if name not in self._mesh.mesh_dim_names and name not in joint:
            known = ", ".join(map(repr, dict.fromkeys([*self._others, *joint])))
            raise ValueError(
                f"process_group={name!r} is no dimension of the mesh: {self._what}; take "
                f'{f"one of {known}, or " if known else ""}"world" for all ranks with other tokens'
            )
        group = joint[name].get_group() if name in joint else self._mesh.get_group(name)
        self.require_others(group)
        return group

    def require_others(self, group: Any) -> None:
        same = self._along([name for name in self._mesh.mesh_dim_names if name not in self._others])
        cure = 'take "world", which counts each token once' + "".join(f", or {name!r}" for name in self._others)
        require_distinct(group, same, f"{self._what}; {cure}")

    def _along(self, names: Sequence[str]) -> list[int]:
        """The ranks that differ from this one in these dimensions alone."""
        ranks = self._mesh.mesh
        own = (ranks == dist.get_rank()).nonzero()[0].tolist()
        places = zip(own, self._mesh.mesh_dim_names, strict=True)
        found: list[int] = (
            ranks[tuple(slice(None) if name in names else place for place, name in places)].flatten().tolist()
        )
        return found
