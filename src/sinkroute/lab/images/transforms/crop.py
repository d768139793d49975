"""The random resized crop of Inception-style training (Szegedy et al. 2014, arXiv 1409.4842, section 6).

A part of the image with a random area and aspect ratio, at a random place, resized to a square.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

__all__ = ["random_resized_crop", "resized_crop_box"]

_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10


def resized_crop_box(
    width: int, height: int, generator: np.random.Generator, min_area: float = 0.08
) -> tuple[int, int, int, int]:
    """Draw (left, top, right, bottom) of a part of a `width` × `height` image.

    The share of the area is uniform in [min_area, 1], the aspect ratio log-uniform in [3/4, 4/3]; a box that does not
    fit is drawn again, 10 times at most. Then it is the largest central part whose ratio is in the range.
    """
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for _ in range(_ATTEMPTS):
        area = width * height * generator.uniform(min_area, 1)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(
    image: Image.Image, size: int, generator: np.random.Generator, min_area: float = 0.08
) -> Image.Image:
    """A random part of `image`, as `resized_crop_box` draws it, resized (bicubic) to `size` × `size`."""
    box = resized_crop_box(*image.size, generator, min_area)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
