"""A run as it was left: its configuration and the model of its last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sinkroute.lab.checkpoint import latest_checkpoint, load_model
from sinkroute.lab.config import Config, read_yaml
from sinkroute.lab.folders import require_run
from sinkroute.lab.models import SparseModel, make_model

__all__ = ["TrainedRun", "load_run"]


@dataclass(frozen=True)
class TrainedRun:
    """What there is of a run.

    Attributes:
        folder: of the run.
        config: with which it was trained.
        checkpoint: the folder of the last checkpoint.
        model: with the weights of that checkpoint (with `train.average`, their average), on the CPU, in training mode.
    """

    folder: Path
    config: Config
    checkpoint: Path
    model: SparseModel

    @property
    def step(self) -> int:
        """Optimiser steps that the model has seen."""
        return int(self.checkpoint.name.removeprefix("step-"))


def load_run(folder: Path) -> TrainedRun:
    """Read a run's configuration and its last checkpoint.

    Raises:
        FileNotFoundError: no run is there, or it has no checkpoint yet.
        ValueError: its configuration cannot be read.
        CheckpointError: its last checkpoint is damaged.
    """
    require_run(folder)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet; let it train to train.checkpoint_every steps")
    config = read_yaml(Config, folder / "config.yaml")
    model = make_model(config)
    load_model(checkpoint, model, averaged=config.train.average is not None)
    return TrainedRun(folder, config, checkpoint, model)
