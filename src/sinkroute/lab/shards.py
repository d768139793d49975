"""Checkpoints of a model that fits no single process: each writes its part, by `torch.distributed.checkpoint`.

The folder `step-000100` then holds `shards/` in place of `model.safetensors`, `optimizer.safetensors` and
`average.safetensors`. All processes must see it, and any number of them can read it, one too (`load_model`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sinkroute.lab.checkpoint import (
    SHARDS,
    CheckpointError,
    Snapshot,
    by_parameter,
    cannot_write,
    check_shards,
    digest,
    latest_checkpoint,
    read_state,
)
from sinkroute.lab.peers import Peers, shared

__all__ = ["read_shards", "write_shards"]


def write_shards(
    peers: Peers,
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    *,
    carried: Mapping[str, Tensor],
    average: nn.Module | None,
) -> None:
    """As `Snapshot.write`, by all processes together.

    Raises:
        CheckpointError: it could not be written; on processes that could, `PeerFailed`. Earlier ones are untouched.
    """
    target = folder / f"step-{step:06d}"
    draft = folder / f".{target.name}.draft"
    doing = f"writing the checkpoint of step {step}"

    def clear() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)

    peers.on_main(doing, clear)
    contents, param_groups = _parts(model, optimizer, average)
    try:
        dcp.save(contents, checkpoint_id=draft / SHARDS)
        own = draft.glob(f"{SHARDS}/__{peers.index}_*")
        digests = {f"{SHARDS}/{path.name}": digest(path) for path in own}
    except (OSError, dcp.api.CheckpointException) as error:
        raise cannot_write(target, error) from error
    found = peers.gather(doing, digests)

    def complete() -> None:
        metadata = {f"{SHARDS}/.metadata": digest(draft / SHARDS / ".metadata")}
        everything = {name: known for part in (metadata, *found) for name, known in part.items()}
        Snapshot({"carried": carried}, param_groups, everything).write(folder, step, state, keep)

    peers.on_main(doing, complete)


def read_shards(
    peers: Peers,
    checkpoints: Path,
    about: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
) -> None:
    """Restore in place what `write_shards` wrote, by all processes together, as many as there are now.

    Args:
        about: what the main process's `state.json` holds.

    Raises:
        CheckpointError: a process sees another checkpoint than the main one or none, or it is damaged; on the others
            `PeerFailed`.
    """
    path = checkpoints / f"step-{about['step']:06d}"

    def check() -> None:
        latest = latest_checkpoint(checkpoints)
        if latest is None or read_state(latest)["own_sha256"] != about["own_sha256"]:
            raise CheckpointError(
                f"{path} is in parts (train.sharded_checkpoints), and here {checkpoints} has "
                f"{'no checkpoint' if latest is None else f'another {latest.name}'}; let --out be a folder that all "
                "processes see"
            )
        check_shards(path, about, peers.index, peers.number)

    peers.each("reading the checkpoint", check)
    contents, _ = _parts(model, optimizer, average)
    try:
        dcp.load(contents, checkpoint_id=path / SHARDS)
    except dcp.api.CheckpointException as error:  # which is no Exception
        raise shared(CheckpointError(f"{path} does not fit this model: {error}")) from error
    set_model_state_dict(model, contents["model"])
    set_optimizer_state_dict(model, optimizer, by_parameter(contents["optimizer"], about["param_groups"]))
    if average is not None:
        set_model_state_dict(average, contents["average"])


def _parts(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """What this process holds, under the names of the whole; and the optimiser's groups."""
    optimizer_state: Any = get_optimizer_state_dict(model, optimizer)
    moments = optimizer_state["state"]
    contents: dict[str, dict[str, Any]] = {
        "model": get_model_state_dict(model),
        "optimizer": {f"{name}/{key}": tensor for name in moments for key, tensor in moments[name].items()},
    }
    if average is not None:
        contents["average"] = get_model_state_dict(average)
    return contents, optimizer_state["param_groups"]
