"""Random erasing (Zhong et al. 2017, arXiv 1708.04896): a random rectangle becomes noise, each pixel its own."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["erase_", "erasing_box"]

_AREA = (0.02, 1 / 3)
_RATIO = (0.3, 1 / 0.3)
_ATTEMPTS = 10


def erasing_box(height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int] | None:
    """Draw (top, left, bottom, right) of a rectangle in an image; None where 10 draws gave none that fits.

    The share of the area is uniform in [0.02, 1/3], the aspect ratio log-uniform in [0.3, 1/0.3].
    """
    for _ in range(_ATTEMPTS):
        area = height * width * generator.uniform(*_AREA)
        ratio = math.exp(generator.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
            return top, left, top + h, left + w
    return None


def erase_(image_CHW: Tensor, probability: float, generator: np.random.Generator) -> None:
    """With `probability`, overwrite a random rectangle of `image_CHW` by standard normal noise, in place.

    Args:
        image_CHW: float, normalised: the noise has the mean and deviation that pixels have then.
    """
    if generator.random() >= probability:
        return
    box = erasing_box(image_CHW.shape[1], image_CHW.shape[2], generator)
    if box is None:
        return
    top, left, bottom, right = box
    noise = generator.standard_normal((len(image_CHW), bottom - top, right - left), dtype=np.float32)
    image_CHW[:, top:bottom, left:right] = torch.from_numpy(noise)
