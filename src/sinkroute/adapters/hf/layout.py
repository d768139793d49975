"""Which ranks hold which tokens of a model of transformers, read off the mesh that it is spread over.

That may come after the patch. It is transformers' own (`tp_plan`, `DistributedConfig`), accelerate's
(`ParallelismConfig`), that of the parameters (FSDP2, plans of the user's), or DeepSpeed's groups. Without any, ranks
are those of data parallelism.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from sinkroute.adapters._engine_ranks import engine_ranks
from sinkroute.adapters._mesh import MeshRanks, Named
from sinkroute.adapters._ranks import Spread, UnknownLayout

__all__ = ["SpreadOf"]


class SpreadOf:
    """Finds how a model is spread over the ranks; see `Layout`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parts = [part for part in model.modules() if hasattr(type(part), "_tp_plan")]

    def __call__(self) -> Spread | None:
        for part in self._parts:
            if (found := _of_transformers(part)) is not None:
                return found
        states = sys.modules.get("accelerate.state")
        mesh = None if states is None else states.AcceleratorState._shared_state.get("device_mesh")
        if mesh is not None:
            return MeshRanks(mesh, "the run of accelerate")
        engine = engine_ranks()
        return engine if engine is not None and not engine.is_plain else _of_parameters(self._model)


def _of_transformers(model: Any) -> MeshRanks | None:
    """Of a model that `from_pretrained` has spread."""
    mesh, manager = getattr(model, "_device_mesh", None), getattr(model, "_mesh_manager", None)
    if mesh is None:
        return None
    kind, tp_size = type(model).__name__, getattr(model, "_tp_size", None) or 1
    if tp_size > 1 and "sequence_parallel" in (model._tp_plan or {}).values():
        raise UnknownLayout(
            f"{kind} has sequence_parallel in its tp_plan, and which tokens come to a router is not known; leave it out"
        )
    if manager is not None:
        return MeshRanks(manager._dense_mesh, kind)
    if mesh.mesh_dim_names is None:  # transformers before 5.22
        mesh = Named(mesh, ["tp" if tp_size > 1 else "fsdp"])
    return MeshRanks(mesh if isinstance(mesh, Named) else mesh._get_root_mesh(), kind)


def _of_parameters(model: nn.Module) -> MeshRanks | None:
    """Of a model whose parameters were sharded by FSDP2, or by a plan of the user's."""
    meshes = (p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
    distinct = {id(mesh): mesh for mesh in meshes}.values()
    roots = list(dict.fromkeys(mesh._get_root_mesh() for mesh in distinct))  # each fully_shard makes one, all equal
    if not roots:
        return None
    what, cure = type(model).__name__, "give process_group=the group of the ranks with other tokens"
    if len(roots) > 1:
        shown = " and ".join(map(str, roots))
        raise UnknownLayout(
            f"the parameters of {what} are on {len(roots)} device meshes, {shown}, and how they go together is not "
            f"known; shard all of them by slices of one mesh, or {cure}"
        )
    root = roots[0]
    names, sharding = root.mesh_dim_names, sys.modules.get("torch.distributed.fsdp")
    is_fsdp = sharding is not None and any(isinstance(part, sharding.FSDPModule) for part in model.modules())
    if names is None and is_fsdp:
        return MeshRanks(Named(root, ["fsdp", "dp"][: root.ndim]), what)
    if names is None:
        raise UnknownLayout(
            f"the parameters of {what} are sharded over a device mesh whose dimensions have no names, so that which "
            f'ranks hold the same tokens is not known; make it with mesh_dim_names=("dp", "tp"), or {cure}'
        )
    # Along its only dimension FSDP has other tokens, whatever it is called.
    return MeshRanks(root, what, other=names if is_fsdp and len(names) == 1 else ())
