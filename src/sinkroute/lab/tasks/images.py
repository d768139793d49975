"""Classifying images: soft targets in training, in evaluation wrong answers to images as they are, or changed.

What an evaluation may do to images, beside the attacks of `lab.attacks.images`:

- "corruption" with `name` and `severity`: one of `lab.images.corruptions`;
- "corruptions": each of the 15 (`extra: true`: of 19) at each of 5 severities. The error of that is the mean corruption
  error; for ImageNet there is also the mCE against AlexNet, of images that are corrupted here and not, as the published
  ones were, stored as JPEG afterwards.

Every one of them takes `limit`: only so many images, evenly over the split, in place of `eval.limit`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

from sinkroute._errors import require_count, unknown_name
from sinkroute.lab.attacks.images import IMAGE_ATTACKS, attack_images
from sinkroute.lab.attacks.images.classifier import Predict
from sinkroute.lab.config import Config, VisionConfig
from sinkroute.lab.evaluation import Evaluation, Score, serving_mode
from sinkroute.lab.images import BatchMixing, ImageBatches, ImageData, evaluation_batches, normalise, scale
from sinkroute.lab.images.corruptions import corrupt, list_corruptions, mce
from sinkroute.lab.models import SparseModel
from sinkroute.lab.tasks.base import Task, Watch

__all__ = ["CorruptedEvaluation", "ImageTask"]


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
        device = next(model.parameters()).device
        name, options = (None, {}) if attack is None else (attack[0], dict(attack[1]))
        batches, whole = self._batches(split, options.pop("limit", self.config.eval.limit))

        def predict(pixels: Tensor) -> Tensor:
            return model(normalise(pixels, self.data.mean, self.data.std))

        changes = _changes(name, options, predict, self.config.seed, self.data)
        scores = {key: Score() for key in changes}
        done = 0
        with serving_mode(model) as serving:
            for number, (bytes_BCHW, labels_B) in enumerate(batches):
                serving.begin_pass(number)
                labels = labels_B.to(device)
                for key, change in changes.items():
                    images = change(bytes_BCHW.to(device), labels, done)
                    serving.loads()  # an attack asks the model too; the pass that counts comes now
                    scores[key].add(predict(images), labels)
                    scores[key].add_loads(serving.loads())
                done += len(labels)
                if on_batch is not None:
                    on_batch(done, whole)
        found = {key: score.found() for key, score in scores.items()}
        return _together(found) if name == "corruptions" else next(iter(found.values()))

    def _batches(self, split: str, limit: int | None) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
        data, whole = self.data, len(getattr(self.data, split))
        if limit is not None and limit < whole:
            # Evenly over the split: many sets are sorted by class.
            part: Any = Subset(getattr(data, split), [place * whole // limit for place in range(limit)])
            data, whole = dataclasses.replace(data, **{split: part}), limit
        return evaluation_batches(data, split, self.config.eval.batch, self.config.train.workers), whole

    def check_attack(self, name: str, options: Mapping[str, Any]) -> None:
        options = dict(options)
        if "limit" in options:
            require_count("limit", options.pop("limit"), 1)

        def predict(pixels: Tensor) -> Tensor:
            # Of a grey image the last class: wrong from the start, so that no attack tries for long.
            return pixels.mean((1, 2, 3))[:, None] * torch.arange(self.data.classes, device=pixels.device)

        image = torch.full((1, self.data.shape[0], 16, 16), 128, dtype=torch.uint8)
        for change in _changes(name, options, predict, self.config.seed, self.data).values():
            change(image, torch.zeros(1, dtype=torch.int64), 0)

    def quality(self, found: Evaluation) -> dict[str, float]:
        quality = {"images": found.count, "error": found.error, "nats": found.nats}
        if isinstance(found, CorruptedEvaluation):
            if self.data.name.startswith("imagenet"):
                quality["mce"] = mce(found.errors)
            quality |= {f"error {name}": sum(errors) / len(errors) for name, errors in found.errors.items()}
        return quality


@dataclass(frozen=True)
class CorruptedEvaluation(Evaluation):
    """What all corruptions at all severities found together: `error` is the mean corruption error.

    Attributes:
        errors: of each corruption, in % at severity 1 to 5.
    """

    errors: dict[str, list[float]]


Change = Callable[[Tensor, Tensor, int], Tensor]
"""(B, C, H, W) uint8 images, (B,) labels, the number of the first -> (B, C, H, W) pixels in [0, 1]."""


def _changes(
    name: str | None, options: dict[str, Any], predict: Predict, seed: int, data: ImageData
) -> dict[tuple[str, int], Change]:
    """What is done to the images before they are classified: one thing, or for "corruptions" each of them.

    Raises:
        ValueError: an unknown attack, or options that are not its own.
    """
    if name is None:
        return {("", 0): lambda images, labels, first: scale(images)}
    if name == "corruption":
        for needed in ("name", "severity"):
            if needed not in options:
                raise ValueError(
                    f"corruption needs the option {needed!r}, got {options}; such as name: fog, severity: 3"
                )
        return {("", 0): _corruption(seed=seed, **options)}
    if name == "corruptions":
        for option in options:
            if option != "extra":
                raise unknown_name("corruptions option", option, ("extra", "limit"))
        return {
            (kind, severity): _corruption(seed=seed, name=kind, severity=severity)
            for kind in list_corruptions(**options)
            for severity in range(1, 6)
        }
    if name not in IMAGE_ATTACKS:
        raise unknown_name("attack on images", name, (*IMAGE_ATTACKS, "corruption", "corruptions"))

    def attacked(images: Tensor, labels: Tensor, first: int) -> Tensor:
        # Each batch has another seed.
        key = int(np.random.SeedSequence([seed, first]).generate_state(1)[0])
        return attack_images(name, predict, scale(images), labels, key, std=data.std, **options)

    return {("", 0): attacked}


def _corruption(*, name: str, severity: int, seed: int, **options: Any) -> Change:
    return lambda images, labels, first: scale(corrupt(name, images, severity, seed, first_index=first, **options))


def _together(parts: dict[tuple[str, int], Evaluation]) -> CorruptedEvaluation:
    each = list(parts.values())
    count = sum(part.count for part in each)
    errors: dict[str, list[float]] = {}
    for (name, _), part in parts.items():
        errors.setdefault(name, []).append(part.error)
    return CorruptedEvaluation(
        count=count,
        nats=sum(part.nats * part.count for part in each) / count,
        wrong=sum(part.wrong for part in each),
        load_LE=torch.stack([part.load_LE for part in each]).sum(0),
        max_vio_batch=sum(part.max_vio_batch for part in each) / len(each),
        errors=errors,
    )
