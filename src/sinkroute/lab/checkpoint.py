"""Checkpoints that survive `kill -9`, a full disk and a flipped bit, and hold no pickle.

A checkpoint is a folder `step-000100` with `model.safetensors`, `optimizer.safetensors` and `state.json`, which
carries what is no tensor and the SHA-256 of all of them; where there is more to remember, also with
`average.safetensors` (the average of the weights) and `carried.safetensors` (the memory of streams). It is written
beside its place under another name and then renamed, which the file system does wholly or not at all: a folder of that
name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)

from sinkroute._errors import SinkrouteError

__all__ = [
    "CheckpointError",
    "Snapshot",
    "gather",
    "latest_checkpoint",
    "list_checkpoints",
    "load_model",
]

SHARDS = "shards"
"""The folder in a checkpoint that was written in parts, see `lab.shards`."""

# Names by parameter, whole tensors on the CPU: the same file from one process or several.
_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


class CheckpointError(SinkrouteError):
    """A checkpoint that cannot be written or read; the message says what to do."""


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, on the CPU of the main process.

    Attributes:
        contents: name of a file → its tensors by name; an empty one is not written.
        param_groups: of the optimiser.
        digests: of files that already lie in the draft (`lab.shards`).
    """

    contents: dict[str, Mapping[str, Any]]
    param_groups: list[dict[str, Any]]
    digests: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
        """Write `folder/step-…` and remove all but the newest `keep` checkpoints; on the main process only.

        Args:
            folder: of all checkpoints of a run.
            step: optimiser steps done.
            state: anything JSON holds, kept with it.
            keep: how many to leave, 1 or more.

        Raises:
            CheckpointError: it could not be written (a full disk, say). Earlier checkpoints are untouched.
        """
        target = folder / f"step-{step:06d}"
        draft = folder / f".{target.name}.draft"
        try:
            if not self.digests:
                shutil.rmtree(draft, ignore_errors=True)  # left by a process that was killed
                draft.mkdir(parents=True)
            digests = dict(self.digests)
            for name, content in self.contents.items():
                if content:
                    file = draft / f"{name}.safetensors"
                    save_file(_whole(content), file)
                    digests[file.name] = digest(file)
            write_about(draft, step, digests, self.param_groups, state)
            complete(draft, target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise cannot_write(target, error) from error
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        return target


def gather(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    carried: Mapping[str, Tensor] | None = None,
    average: nn.Module | None = None,
) -> Snapshot:
    """What to save, whole: of parts that lie on several processes (FSDP2) a collective call, all of them or none."""
    optimizer_state: Any = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    moments = optimizer_state.get("state", {})  # on all but the main process there is nothing
    tensors = {f"{name}/{key}": tensor for name in moments for key, tensor in moments[name].items()}
    contents: dict[str, Mapping[str, Any]] = {
        "model": get_model_state_dict(model, options=_OPTIONS),
        "optimizer": tensors,
        "average": {} if average is None else get_model_state_dict(average, options=_OPTIONS),
        "carried": carried or {},
    }
    return Snapshot(contents, optimizer_state.get("param_groups", []))


def write_about(
    draft: Path, step: int, digests: dict[str, str], param_groups: list[dict[str, Any]], state: dict[str, Any]
) -> None:
    """Write `state.json`: what is no tensor, and the SHA-256 of what is."""
    about = {"step": step, "sha256": digests, "param_groups": param_groups, "state": state}
    about["own_sha256"] = _own_digest(about)
    (draft / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def complete(draft: Path, target: Path) -> None:
    """Make a draft that is on the disk the checkpoint."""
    for path in draft.iterdir():
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    _flush(target.parent)


def cannot_write(target: Path, error: BaseException) -> CheckpointError:
    """What to say when a checkpoint could not be written."""
    folder = target.parent
    older = latest_checkpoint(folder)
    full = "No space left" in str(error)  # safetensors leaves no more of the cause than its text
    return CheckpointError(
        f"cannot write the checkpoint {target}: {error}. "
        + (
            f"The disk is full ({shutil.disk_usage(folder.parent).free >> 20} MiB free): free some space. "
            if full
            else ""
        )
        + (f"Nothing is lost up to {older.name}" if older else "There is no earlier checkpoint")
        + "; the same command resumes from there."
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def by_parameter(tensors: Mapping[str, Tensor], param_groups: list[dict[str, Any]]) -> Any:
    """The state of an optimiser as torch nests it, from the names of the file."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(parameter, {})[key] = tensor
    return {"state": state, "param_groups": param_groups}


def load_model(path: Path, model: nn.Module, *, averaged: bool = False) -> None:
    """Restore the weights of a model in place from a checkpoint folder: the last ones, or their average.

    Raises:
        CheckpointError: damaged, incomplete, or of another model.
    """
    name, about = "average" if averaged else "model", read_state(path)
    if in_shards(about):
        check_shards(path, about)
        tensors: dict[str, Any] = get_model_state_dict(model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
                dcp.load({name: tensors}, checkpoint_id=path / SHARDS, no_dist=True)
        except dcp.api.CheckpointException as error:
            raise CheckpointError(f"{path} does not fit this model: {error}") from error
    else:
        tensors = {**read_tensors(path, name, about)}
        require_fit(path, model, tensors)
    set_model_state_dict(model, tensors, options=_OPTIONS)


def in_shards(about: dict[str, Any]) -> bool:
    """Whether a checkpoint was written in parts; `about` is what `state.json` holds."""
    return f"{SHARDS}/.metadata" in about["sha256"]


def check_shards(path: Path, about: dict[str, Any], index: int = 0, number: int = 1) -> None:
    """Compare the parts with their SHA-256; of several processes, each looks at some.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    for name, expected in sorted(about["sha256"].items())[index::number]:
        if name.startswith(SHARDS):
            _check_digest(path / name, expected)


def require_fit(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Check, without loading them, that these are the tensors of the model.

    Raises:
        CheckpointError: names or shapes differ.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        first = f"{names[0]} has shape {found.get(names[0])}, the model's {wanted.get(names[0])}"
        raise CheckpointError(
            f"{path} does not fit this model: {first}"
            + (f", and {len(names) - 1} more differ" if len(names) > 1 else "")
            + ". Use the configuration with which it was trained."
        )


def read_state(path: Path) -> dict[str, Any]:
    """What `state.json` holds."""
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if content["own_sha256"] != _own_digest(content):
            raise ValueError("its SHA-256 is not the one it states")
        return content
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no checkpoint: it has no state.json. {_cure(path)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'} is damaged ({error!r}). {_cure(path)}") from None


def read_tensors(path: Path, name: str, content: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of `name`.safetensors; `content` is what `state.json` holds."""
    file = path / f"{name}.safetensors"
    _check_digest(file, content["sha256"].get(file.name))
    return load_file(file)


def _check_digest(file: Path, expected: str | None) -> None:
    path = next(parent for parent in file.parents if parent.name.startswith("step-"))
    if not file.exists():
        raise CheckpointError(f"{file} is missing. {_cure(path)}")
    found = digest(file)
    if found != expected:
        raise CheckpointError(
            f"{file} is damaged: its {file.stat().st_size} bytes have SHA-256 {found[:12]}…, "
            f"expected {str(expected)[:12]}…. {_cure(path)}"
        )


def _cure(path: Path) -> str:
    others = [other.name for other in list_checkpoints(path.parent) if other != path]
    then = f"continue from {others[-1]}" if others else "start anew (no other checkpoint is there)"
    return f"Delete {path} and run the same command to {then}."


def _whole(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        # hashlib.file_digest needs Python 3.11
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _own_digest(content: dict[str, Any]) -> str:
    """Of what `state.json` holds beside this digest itself."""
    rest = {name: value for name, value in content.items() if name != "own_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Make sure that a file, or a folder's names, are on the disk and not in a cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
