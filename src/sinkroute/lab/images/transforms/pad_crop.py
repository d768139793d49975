"""Pad and crop: the image moved by a few pixels, the light augmentation of small images (He et al., 1512.03385)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["pad_crop"]


def pad_crop(image_CHW: Tensor, padding: int, generator: np.random.Generator) -> Tensor:
    """Pad each side by `padding` black pixels and cut a part of the old size at a uniformly random place.

    That is: move the image by -padding to padding pixels each way, and fill with black what comes from outside.
    """
    height, width = image_CHW.shape[1:]
    down, right = generator.integers(-padding, padding + 1, size=2).tolist()
    moved = image_CHW.new_zeros(image_CHW.shape)
    moved[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image_CHW[
        :, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return moved
