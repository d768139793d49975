"""What the training loop must know of a task: where batches come from, what the loss is, how good a model is."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from sinkroute.lab.config import Config
from sinkroute.lab.evaluation import Evaluation
from sinkroute.lab.models import SparseModel

__all__ = ["Task", "Watch"]

Watch = Callable[[int, int], None]
"""Told (done, in all) after each forward pass of an evaluation."""


class Task(abc.ABC):
    """A kind of problem, with its data.

    Attributes:
        config: of the run.
        name: "text" or "images", as results say it.
        metric: the key of `quality` that a comparison looks at; lower is better.
        items: what training reads, in order: optimiser step s takes the items s·batch to (s + 1)·batch − 1. An item
            depends on the seed and its index alone.
        items_each: symbols (or images) in an item.
    """

    name: str
    metric: str
    items: Dataset[dict[str, Tensor]]
    items_each: int

    def __init__(self, config: Config) -> None:
        self.config = config

    @abc.abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Tensor], step: int, part: int) -> Tensor:
        """0-d, of micro-batch `part` of optimiser step `step`; `model` may be wrapped for several processes."""

    def carried(self) -> dict[str, Tensor]:
        """What the next step needs of this one beside weights and optimiser, rows of the batch first."""
        return {}

    def carry_on(self, carried: Mapping[str, Tensor]) -> None:
        """Take up what `carried` gave."""
        if carried:
            raise ValueError(f"this task carries nothing from step to step, got {', '.join(carried)}")

    @abc.abstractmethod
    def evaluate(
        self,
        model: SparseModel,
        split: str,
        attack: tuple[str, Mapping[str, Any]] | None = None,
        on_batch: Watch | None = None,
    ) -> Evaluation:
        """A model on "valid" or "test", as it serves; under an attack, (its name, its options)."""

    @abc.abstractmethod
    def check_attack(self, name: str, options: Mapping[str, Any]) -> None:
        """Try an attack on next to nothing: a misspelt one must not wait for the end of training.

        Raises:
            ValueError: an unknown attack or option, or a value out of range.
        """

    @abc.abstractmethod
    def quality(self, found: Evaluation) -> dict[str, float]:
        """The numbers of an evaluation that belong into results, `metric` among them."""
