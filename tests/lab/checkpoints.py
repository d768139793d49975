"""Checkpoints of one process, as training writes and restores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sinkroute.lab.checkpoint import gather
from sinkroute.lab.peers import join
from sinkroute.lab.resume import restore


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    **more: Any,
) -> Path:
    return gather(model, optimizer, **more).write(folder, step, state, keep)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return _restored(path, model, optimizer)[0]


def load_carried(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return _restored(path, model, optimizer)[1]


def _restored(path: Path, *parts: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    peers = join(1.0)
    with peers.guard():
        found = restore(peers, path.parent, *parts, None, torch.device("cpu"))
    assert found is not None
    return found
