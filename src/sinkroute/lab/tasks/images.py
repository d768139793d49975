"""Classifying images: soft targets in training, wrong answers in evaluation, as they are, attacked or corrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

from sinkroute._errors import require_count
from sinkroute.lab.attacks.images import attack_images
from sinkroute.lab.config import Config, VisionConfig
from sinkroute.lab.evaluation import Evaluation, Score, serving_mode
from sinkroute.lab.images import BatchMixing, ImageBatches, ImageData, evaluation_batches, normalise, scale
from sinkroute.lab.models import SparseModel
from sinkroute.lab.tasks.base import Task, Watch

__all__ = ["ImageTask"]


class ImageTask(Task):
    """Say which class an image shows.

    Raises:
        ValueError: images whose channels or classes are not the model's; a model without a mixture.
    """

    name = "images"
    metric = "error"
    items_each = 1

    def __init__(self, config: Config, data: ImageData) -> None:
        super().__init__(config)
        model, train, augment = config.model, config.train, config.data.augment
        assert isinstance(model, VisionConfig)
        found = {"channels": data.shape[0], "image_size": data.shape[1], "classes": data.classes}
        for name, value in found.items():
            if getattr(model, name) != value:
                raise ValueError(
                    f"model.{name} must be {value} like that of the images {data.name!r}, got {getattr(model, name)}"
                )
        if model.moe_from >= model.layers:
            raise ValueError(
                f"model.moe_from must be below model.layers={model.layers}, got {model.moe_from}: "
                "the lab trains and measures mixtures, and there would be none"
            )
        self.data = data
        self.items = ImageBatches(data, train.batch, config.seed, train.steps, augment)
        self._mixing = BatchMixing(augment, data.classes, config.seed)

    def loss(self, model: Any, batch: Mapping[str, Tensor], step: int, part: int) -> Tensor:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        images, targets = self._mixing(batch["images"], batch["labels"], step, part * ranks + rank)
        return F.cross_entropy(model(images).float(), targets)

    def evaluate(
        self,
        model: SparseModel,
        split: str,
        attack: tuple[str, Mapping[str, Any]] | None = None,
        on_batch: Watch | None = None,
    ) -> Evaluation:
        name, options = (None, {}) if attack is None else (attack[0], dict(attack[1]))
        limit = options.pop("limit", None)
        images = len(getattr(self.data, split)) if limit is None else min(limit, len(getattr(self.data, split)))
        device = next(model.parameters()).device
        score = Score()

        def predict(pixels: Tensor) -> Tensor:
            return model(normalise(pixels, self.data.mean, self.data.std))

        with serving_mode(model) as serving:
            for number, (bytes_BCHW, labels_B) in enumerate(self._batches(split, limit)):
                serving.begin_pass(number)
                pixels, labels = scale(bytes_BCHW).to(device), labels_B.to(device)
                if name is not None:
                    # The attack's passes come before the one that counts.
                    key = int(np.random.SeedSequence([self.config.seed, number]).generate_state(1)[0])
                    pixels = attack_images(name, predict, pixels, labels, key, std=self.data.std, **options)
                score.add(predict(pixels), labels)
                score.add_load(model)
                if on_batch is not None:
                    on_batch(score.count, images)
        return score.found()

    def _batches(self, split: str, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.data
        if limit is not None and limit < (whole := len(getattr(data, split))):
            # Evenly over the split: many sets are sorted by class.
            part: Any = Subset(getattr(data, split), [place * whole // limit for place in range(limit)])
            data = dataclasses.replace(data, **{split: part})
        return evaluation_batches(data, split, self.config.eval.batch, self.config.train.workers)

    def check_attack(self, name: str, options: Mapping[str, Any]) -> None:
        options = dict(options)
        if "limit" in options:
            require_count("limit", options.pop("limit"), 1)
        classes = self.data.classes

        def predict(pixels: Tensor) -> Tensor:
            # Of a grey image the last class: wrong from the start, so that no attack tries for long.
            return pixels.mean((1, 2, 3))[:, None] * torch.arange(classes, device=pixels.device)

        side = min(self.data.shape[1], 16)
        image = torch.full((1, self.data.shape[0], side, side), 0.5)
        attack_images(name, predict, image, torch.zeros(1, dtype=torch.int64), 0, std=self.data.std, **options)

    def quality(self, found: Evaluation) -> dict[str, float]:
        return {"images": found.count, "error": found.error, "nats": found.nats}
