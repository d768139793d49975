"""An ImageNet classifier on ImageNet-C, -A, -R and -O: other images than those that it was trained for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sinkroute.lab.evaluation import serving_mode
from sinkroute.lab.images import (
    EvaluationImages,
    ImageData,
    detection_aupr,
    load_shifted,
    normalise,
    read_wnids,
    scale,
)
from sinkroute.lab.images.corruptions import list_corruptions, mce
from sinkroute.lab.models import SparseModel

__all__ = ["evaluate_shifted"]

SEVERITIES = range(1, 6)


def evaluate_shifted(
    model: SparseModel,
    data: ImageData,
    name: str,
    path: str | Path,
    wnids: str | Path,
    *,
    batch: int,
    workers: int = 0,
    on_status: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a classifier of ImageNet-1K on one of the shifted sets, as it serves.

    Args:
        model: a trained classifier of the 1000 classes.
        data: ImageNet-1K; its mean and deviation, size, and for "imagenet-o" its validation images.
        name: "imagenet-a", "imagenet-c", "imagenet-o" or "imagenet-r".
        path: the folder that the set's archive unpacks to.
        wnids: where the 1000 class ids stand, see `read_wnids`.
        batch: images in a forward pass.
        workers: processes that decode.
        on_status: told what is measured.

    Returns:
        "error" in %; for "imagenet-c" the mean over corruptions and severities, with "mce" (against AlexNet) and
        "errors" by corruption; for "imagenet-o" instead "aupr" in [0, 1].

    Raises:
        ValueError, FileNotFoundError: as `load_shifted` and `read_wnids`.
    """
    ids = read_wnids(wnids)
    device = next(model.parameters()).device

    def answers(split: Any, margin: bool) -> Iterator[tuple[Tensor, Tensor]]:
        images = EvaluationImages(split, data.shape[1], margin)
        for number, part in enumerate(DataLoader(images, batch_size=batch, num_workers=workers)):
            serving.begin_pass(number)
            yield model(normalise(scale(part["images"].to(device)), data.mean, data.std)).float(), part["labels"]

    def error(corruption: str | None = None, severity: int | None = None) -> float:
        shifted = load_shifted(name, path, ids, corruption, severity)
        if on_status is not None:
            on_status(shifted.name)
        wrong = [
            shifted.errors(logits, labels.to(device)) for logits, labels in answers(shifted.images, shifted.margin)
        ]
        return 100 * torch.cat(wrong).double().mean().item()

    with serving_mode(model) as serving:
        if name == "imagenet-o":
            shifted = load_shifted(name, path, ids)
            classes = shifted.classes.to(device)
            known, unknown = (
                torch.cat([logits[:, classes] for logits, _ in answers(split, margin)])
                for split, margin in ((shifted.known(data.valid), True), (shifted.images, shifted.margin))
            )
            return {"aupr": detection_aupr(known, unknown)}
        if name != "imagenet-c":
            return {"error": error()}
        errors = {each: [error(each, severity) for severity in SEVERITIES] for each in list_corruptions()}
    mean = sum(map(sum, errors.values())) / (len(errors) * len(SEVERITIES))
    return {"error": mean, "mce": mce(errors), "errors": errors}
