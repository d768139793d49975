"""Mixup and cutmix on a whole batch, with soft targets.

Each image is mixed with the one at the mirrored place of the batch, all with one λ: by mixup (Zhang et al. 2017, arXiv
1710.09412), x = λ·x_i + (1 − λ)·x_j, or by cutmix (Yun et al. 2019, arXiv 1905.04899), where a rectangle of x_i is
replaced by that of x_j and λ is the share of the area that stays. The target is λ·y_i + (1 − λ)·y_j.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sinkroute.lab.images.augment import Augment

__all__ = ["BatchMixing", "cutmix", "cutmix_box", "mixup", "soft_targets"]


def soft_targets(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B, classes) float32: 1 − smoothing for the label, and smoothing spread evenly over all classes, it included.

    >>> soft_targets(torch.tensor([1]), 4, 0.2)
    tensor([[0.0500, 0.8500, 0.0500, 0.0500]])
    """
    targets = torch.full((len(labels_B), classes), smoothing / classes, device=labels_B.device)
    return targets.scatter_(1, labels_B[:, None], 1 - smoothing + smoothing / classes)


def mixup(images_BCHW: Tensor, share: float) -> Tensor:
    """λ = `share` of each image and 1 − λ of the one at the mirrored place of the batch."""
    return torch.lerp(images_BCHW.flip(0), images_BCHW, share)


def cutmix(images_BCHW: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Each image with the rectangle (top, left, bottom, right) of the one at the mirrored place of the batch."""
    top, left, bottom, right = box
    mixed = images_BCHW.clone()
    mixed[:, :, top:bottom, left:right] = images_BCHW.flip(0)[:, :, top:bottom, left:right]
    return mixed


def cutmix_box(height: int, width: int, share: float, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw (top, left, bottom, right): 1 − `share` of the area around a uniform centre, cut off at the image's edge."""
    h, w = int(height * math.sqrt(1 - share)), int(width * math.sqrt(1 - share))
    y, x = generator.integers(height), generator.integers(width)
    top, left = max(y - h // 2, 0), max(x - w // 2, 0)
    bottom, right = min(y + h // 2, height), min(x + w // 2, width)
    return int(top), int(left), int(bottom), int(right)


class BatchMixing:
    """Mixes a batch as `Augment` says; the draws are keyed by (seed, step, micro-batch).

    Without mixup and cutmix it leaves images as they are and only makes (smoothed) targets.

    Args:
        augment: its `mixup`, `cutmix`, `switch` and `smoothing`.
        classes: of the data set.
        seed: at least 0.

    >>> mixing = BatchMixing(Augment(mixup=0.8, smoothing=0.1), classes=10, seed=0)
    >>> images, targets = mixing(torch.rand(4, 1, 8, 8), torch.tensor([3, 1, 4, 1]), step=0)
    >>> images.shape, targets.shape
    (torch.Size([4, 1, 8, 8]), torch.Size([4, 10]))
    """

    def __init__(self, augment: Augment, classes: int, seed: int) -> None:
        self.augment = augment
        self.classes = classes
        self.seed = seed

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor, step: int, micro_batch: int = 0) -> tuple[Tensor, Tensor]:
        """The mixed images, and (B, classes) float32 targets whose rows sum to 1.

        Args:
            images_BCHW: float.
            labels_B: int64.
            step: which step of the training it is.
            micro_batch: which part of the step's batch it is.
        """
        augment = self.augment
        targets = soft_targets(labels_B, self.classes, augment.smoothing)
        if not augment.mixes:
            return images_BCHW, targets
        generator = np.random.default_rng([self.seed, 3, step, micro_batch])
        by_cutmix = generator.random() < (augment.switch if augment.mixup and augment.cutmix else bool(augment.cutmix))
        alpha = augment.cutmix if by_cutmix else augment.mixup
        share = float(generator.beta(alpha, alpha))
        if by_cutmix:
            height, width = images_BCHW.shape[2:]
            top, left, bottom, right = box = cutmix_box(height, width, share, generator)
            images = cutmix(images_BCHW, box)
            share = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            images = mixup(images_BCHW, share)
        return images, torch.lerp(targets.flip(0), targets, share)
