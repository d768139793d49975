"""Small runs of a small model that reads a small corpus of words as streams."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file

from sinkroute.lab.checkpoint import latest_checkpoint
from sinkroute.lab.config import Config, from_mapping
from sinkroute.lab.data import Corpus, Vocabulary
from sinkroute.lab.data.corpus import encoded_corpus
from sinkroute.lab.interrupt import Interrupted, StopRequest
from sinkroute.lab.run_folder import prepare_folder
from sinkroute.lab.training import Progress, train

WORDS = (*(f"word{number}" for number in range(20)), "<unk>", "<eos>", "AAA")


def words(name: str = "drawn", symbols: int = 3000) -> Corpus:
    """So many words to train on, every third one the one before it: there is something to learn."""
    ids = np.random.default_rng(0).integers(len(WORDS), size=symbols + 600)
    ids[2::3] = ids[1::3][: len(ids[2::3])]
    return encoded_corpus(name, "drawn with a seed", Vocabulary(WORDS), ids[:symbols], ids[symbols:-300], ids[-300:])


def config(**sections: dict[str, Any]) -> Config:
    """Of a stream of two layers with dropout, two micro-batches a step and a router that draws."""
    sizes = {"name": "stream", "vocab": len(WORDS), "layers": 2, "d_model": 16, "heads": 2, "span": 12}
    defaults: dict[str, dict[str, Any]] = {
        "data": {"name": "drawn", "length": 8},
        "model": {**sizes, "d_hidden": 8, "experts": 4, "dropout": 0.1},
        "router": {"name": "ssr-l", "options": {"probability": 0.5, "noise": 0.3}},
        "train": {"steps": 6, "batch": 4, "accumulation": 2, "warmup": 2, "log_every": 1, "checkpoint_every": 2},
        "eval": {"batch": 4},
    }
    return from_mapping(Config, {name: {**defaults[name], **sections.get(name, {})} for name in defaults})


class Killed(Exception):
    """As much of a kill -9 as one process can bear: nothing is saved after it."""


def run(settings: Config, folder: Path, kill_at: int | None = None, stop_at: int | None = None) -> None:
    stop = StopRequest()

    def watch(progress: Progress) -> None:
        if progress.step == kill_at:
            raise Killed
        stop.asked = progress.step == stop_at

    corpus = words()
    state = PartialState(cpu=True)
    if state.is_main_process:
        prepare_folder(settings, corpus, folder)
    state.wait_for_everyone()
    train(settings, corpus, folder, stop=stop, on_progress=watch)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def saved(folder: Path, name: str) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return load_file(checkpoint / f"{name}.safetensors")


WITHOUT_DRAWS: dict[str, Any] = {"model": {"dropout": 0.0}, "router": {"name": "softmax", "options": {}}}


def runs_of_two_ranks() -> dict[str, Any]:
    """On a rank: losses and memories of a run without any draws, of one with, and of that one stopped at step 3."""
    rank = dist.get_rank()
    # Accelerate joins the group that is there if the launcher's variables say that there is one.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}
    assert PartialState(cpu=True).num_processes == 2
    here: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(here)
    folder = Path(here[0])
    plain, drawing = config(**WITHOUT_DRAWS), config()
    found: dict[str, Any] = {}
    for name, settings, stop_at in (("plain", plain, None), ("drawing", drawing, None), ("stopped", drawing, 3)):
        if stop_at is not None:
            try:
                run(settings, folder / name, stop_at=stop_at)
            except Interrupted:
                found["asked"] = latest_checkpoint(folder / name / "checkpoints").name
        run(settings, folder / name)
        dist.barrier()
        found[name] = {"losses": losses(folder / name), **saved(folder / name, "carried")}
    return found
