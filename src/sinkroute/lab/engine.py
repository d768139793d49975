"""Accelerate as the lab uses it: one process, data-parallel, or sharded by FSDP2. What it would do wrong is refused."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from sinkroute.lab.config import TrainConfig
from sinkroute.lab.models import SparseModel

__all__ = ["holds_a_part", "make_accelerator", "shard_like"]

# What `accelerate launch` asks for by variables, and passes over in silence where it cannot be had.
_ASKED = tuple(f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"))


def make_accelerator(settings: TrainConfig, folder: Path) -> Accelerator:
    """Accelerate for a run.

    Raises:
        ValueError: `accelerate launch` was asked for an engine that the lab does not train with, or that cannot be had
            here; a tracker whose package is missing; a batch that the processes cannot share.
    """
    for tracker in settings.trackers:  # Accelerate would train without it, in silence
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(
                f"train.trackers has {tracker!r}, and the package is missing: pip install {tracker} "
                f"(sinkroute[{'lab' if tracker == 'tensorboard' else 'track'}] has it), or leave it out"
            )
    asked = [variable for variable in _ASKED if os.environ.get(variable, "false").lower() == "true"]
    on_device = torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=not on_device,
        mixed_precision=settings.precision,
        # Several micro-batches, one synchronisation: also across the end of the loader, which is the end of training.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.accumulation, sync_with_dataloader=False
        ),
        # `batch` counts over all processes: the same run on one GPU or eight.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # DDP sorts its buckets anew after its first step, unless it looks for unused weights. The order in which
        # three or more ranks are summed depends on the place in a bucket: a resumed run would differ in the last bit.
        kwargs_handlers=[] if on_device else [DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=list(settings.trackers) or None,
        project_dir=str(folder),
    )
    _check_engine(accelerator, asked)
    micro_batch = settings.batch // settings.accumulation
    if micro_batch % accelerator.num_processes:
        raise ValueError(
            f"train.batch / train.accumulation = {micro_batch} sequences cannot be shared by "
            f"{accelerator.num_processes} processes; make it a multiple"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        # Weights stay float32 and autocast does the rest, as without sharding: rounded gates would route otherwise.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    elif settings.sharded_checkpoints:
        raise ValueError(
            "train.sharded_checkpoints=True needs FSDP2 (accelerate launch --use_fsdp --fsdp_version 2): without it "
            "each process holds all of the model. Leave it False"
        )
    return accelerator


def _check_engine(accelerator: Accelerator, asked: list[str]) -> None:
    got = accelerator.distributed_type
    for variable in asked:
        if variable.endswith("FSDP") and got == DistributedType.FSDP:
            continue
        if variable.endswith("FSDP"):
            raise ValueError(
                f"{variable}=true asks for FSDP, which Accelerate does not give on {accelerator.device.type} with "
                f"{accelerator.num_processes} process(es): the run would be {got.value} in silence. FSDP needs 2 or "
                "more processes with a GPU each; leave out --use_fsdp for plain data parallelism"
            )
        raise ValueError(
            f"{variable}=true: the lab trains data-parallel or with FSDP2; leave it out, and see docs/trainers.md for "
            "that engine"
        )
    if got == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 flattens weights, whose names checkpoints need; pass --fsdp_version 2")


def holds_a_part(model: SparseModel) -> bool:
    """Whether each process holds a part of the model only (FSDP2): then all evaluate it, and save it, together."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def shard_like(model: SparseModel, other: SparseModel, accelerator: Accelerator) -> SparseModel:
    """Lay `other`, a model of the same shape that is whole, out over the processes as FSDP2 did with `model`."""
    other.to(accelerator.device)
    twins = dict(other.named_modules())
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, FSDPModule):
            fully_shard(twins[name])
    return other
