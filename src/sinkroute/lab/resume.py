"""Where a run continues: the main process reads the checkpoint, all others get it from there.

So the processes cannot disagree, and a cluster without a disk that all of them see needs none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

from sinkroute.lab.checkpoint import (
    by_parameter,
    in_shards,
    latest_checkpoint,
    read_state,
    read_tensors,
    require_fit,
)
from sinkroute.lab.peers import Peers
from sinkroute.lab.shards import read_shards

__all__ = ["restore"]


def restore(
    peers: Peers,
    checkpoints: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Continue from the main process's latest checkpoint, on all processes; None: it has none.

    Args:
        peers: the processes.
        checkpoints: the folder of them; only the main process looks into it.
        model, optimizer, average: restored in place, also where each process holds a part (FSDP2).
        device: for what is carried.

    Returns:
        What was saved as `state`, and what was saved as `carried`, of all processes.

    Raises:
        CheckpointError: damaged, incomplete, or of another model; on the others `PeerFailed`.
    """
    tensors: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "average": {}, "carried": {}}

    def read() -> dict[str, Any] | None:
        path = latest_checkpoint(checkpoints)
        if path is None:
            return None
        about = read_state(path)
        for name in tensors:
            if f"{name}.safetensors" in about["sha256"] and (name != "average" or average is not None):
                tensors[name] = read_tensors(path, name, about)
        if not in_shards(about):
            require_fit(path, model, tensors["model"])
            if average is not None:
                require_fit(path, average, tensors["average"])
        shapes = {name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors["carried"].items()}
        return {**about, "carried": shapes}

    about = peers.on_main("reading the checkpoint", read)
    if about is None:
        return None
    if in_shards(about):
        read_shards(peers, checkpoints, about, model, optimizer, average)
    else:
        _broadcast(peers, tensors, about, model, optimizer, average)
    carried: dict[str, Tensor] = {}
    for name, (shape, dtype) in about["carried"].items():
        tensor = tensors["carried"].get(name)
        if tensor is None:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        carried[name] = tensor.to(device)
        if peers.number > 1:
            dist.broadcast(carried[name], src=0)
    return about["state"], carried


def _broadcast(
    peers: Peers,
    tensors: dict[str, dict[str, Any]],
    about: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
) -> None:
    """Load what the main process has read, on all; where each holds a part (FSDP2), that part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=peers.number > 1)
    set_model_state_dict(model, tensors["model"], options=options)
    moments = by_parameter(tensors["optimizer"], about["param_groups"]) if peers.is_main else {}
    set_optimizer_state_dict(model, optimizer, moments, options=options)
    if average is not None:
        set_model_state_dict(average, tensors["average"], options=options)
