"""The ranks of a router, from torchtitan's `ParallelDims`.

Its world is (pp, batch, cp, tp). Ranks of one place in pp have the same layers: they are a stage, and whatever routers
say to each other stays in it. Of a stage, ranks of other places in batch and cp have other tokens; those of other
places in tp have the same ones, unless experts are parallel: then torchtitan cuts the sequence for them.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import Any

import torch.distributed as dist

from sinkroute.routing.ranks import Ranks, RouterRanks

__all__ = ["ranks_in"]

# All dimensions that a mesh of torchtitan's may have; which of them, says its `spmd_backend`.
_DIMENSIONS = ("batch", "loss", "dp", "dp_replicate", "dp_shard", "fsdp", "cp", "tp", "ep", "efsdp")

# Of the world's group: the groups that were made, by their ranks.
_made: MutableMapping[Any, dict[tuple[int, ...], Any]] = weakref.WeakKeyDictionary()


def ranks_in(dims: Any, plan: Ranks) -> RouterRanks:
    """Whose tokens a plan balances, whose loads are counted, whose tokens differ.

    Args:
        dims: torchtitan's `ParallelDims`.
        plan: the option. `"world"` is the stage, each token once; a name is a dimension of the mesh.

    Raises:
        ValueError: no such dimension, or a group with ranks of another stage.
        RuntimeError: a mesh that is not (batch, cp, tp) within a stage.
    """
    stage, others = _stage(dims)
    return RouterRanks(_plan(dims, plan, stage, others), others, others)


def _stage(dims: Any) -> tuple[list[int], Ranks]:
    """The ranks of this stage, and those that have other tokens, this one included."""
    try:
        mesh = dims.get_optional_mesh(["batch", "cp", "tp"], include_singleton_axes=True)
        places = mesh.mesh
        if mesh.mesh_dim_names != ("batch", "cp", "tp") or places.numel() * dims.pp != dims.world_size:
            raise ValueError(f"it has {mesh.mesh_dim_names} with {places.numel()} of {dims.world_size} ranks")
    except (AttributeError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"torchtitan's ranks of a pipeline stage are not known as (batch, cp, tp): {error}; install "
            "torchtitan==0.3.0, or a sinkroute that knows this one"
        ) from error
    stage = sorted(places.flatten().tolist())
    if _holds_same_over_tp(dims):
        places = places[:, :, mesh.get_local_rank("tp")]
    return stage, _group(dims, sorted(places.flatten().tolist()))


def _holds_same_over_tp(dims: Any) -> bool:
    return bool(dims.tp > 1 and dims.ep == 1)


def _plan(dims: Any, plan: Ranks, stage: list[int], others: Ranks) -> Ranks:
    if plan == Ranks("world"):
        return others
    name = plan.name
    if name is None:
        if (group := plan.group) is not None and not set(dist.get_process_group_ranks(group)) <= set(stage):
            raise ValueError(
                f"process_group has the ranks {dist.get_process_group_ranks(group)}, and those of this pipeline stage "
                f'are {stage}: the others have other layers; give "world" for all of a stage, or a dimension of it, '
                f"{_known(dims)}"
            )
        return plan
    if name not in _known(dims):
        why = "its ranks have other layers" if name == "pp" else "there is no such dimension"
        raise ValueError(
            f'process_group={name!r}: {why}; give one of {_known(dims)} of torchtitan\'s mesh, or "world" for all '
            "ranks of a pipeline stage"
        )
    mesh = dims.get_optional_mesh(name)
    if mesh is None or mesh.size() == 1 or (name == "tp" and _holds_same_over_tp(dims)):
        return Ranks(None)  # nobody has more tokens than this rank
    return Ranks(mesh.get_group())


def _known(dims: Any) -> list[str]:
    def is_known(name: str) -> bool:
        try:
            dims.get_optional_mesh(name)
        except ValueError:
            return False
        return True

    return [name for name in _DIMENSIONS if is_known(name)]


def _group(dims: Any, ranks: list[int]) -> Ranks:
    """A group of these ranks: a mesh's where there is one. Otherwise a collective call of these ranks alone."""
    if len(ranks) == 1:
        return Ranks(None)
    if len(ranks) == dims.world_size:
        return Ranks("world")
    for mesh in dims.get_all_one_dimensional_meshes().values():
        if sorted(mesh.mesh.flatten().tolist()) == ranks:
            return Ranks(mesh.get_group())
    made = _made.setdefault(dist.group.WORLD, {})
    if tuple(ranks) not in made:
        made[tuple(ranks)] = dist.new_group(ranks, use_local_synchronization=True)
    return Ranks(made[tuple(ranks)])
