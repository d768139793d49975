"""The horizontal flip."""

from __future__ import annotations

import numpy as np
from PIL import ImageOps
from PIL.Image import Image

__all__ = ["random_flip"]


def random_flip(image: Image, probability: float, generator: np.random.Generator) -> Image:
    """`image`, mirrored left to right with `probability`."""
    return ImageOps.mirror(image) if generator.random() < probability else image
