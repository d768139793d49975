"""Pad and crop: the image moved by a few pixels, the light augmentation of small images (He et al., 1512.03385)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["pad_crop"]


def pad_crop(image_CHW: Tensor, padding: int, generator: np.random.Generator) -> Tensor:
    """Pad each side by `padding` black pixels and cut a part of the old size at a uniformly random place."""
    channels, height, width = image_CHW.shape
    top, left = generator.integers(2 * padding + 1, size=2).tolist()
    padded = image_CHW.new_zeros(channels, height + 2 * padding, width + 2 * padding)
    padded[:, padding : padding + height, padding : padding + width] = image_CHW
    return padded[:, top : top + height, left : left + width]
