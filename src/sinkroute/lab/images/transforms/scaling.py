"""From bytes to what a model reads: [0, 1], then zero mean and unit deviation per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["normalise", "scale"]


def scale(images: Tensor) -> Tensor:
    """uint8 pixels as float32 in [0, 1].

    Raises:
        TypeError: the dtype is not uint8.

    >>> scale(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist()
    [0.0, 0.20000000298023224, 1.0]
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8 pixels, got {images.dtype}")
    return images.float() / 255


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x − mean) / std per channel.

    Args:
        images: (..., C, H, W) float, in [0, 1] as `scale` gives it.
        mean: C floats.
        std: C floats above 0.

    >>> normalise(torch.full((1, 1, 1), 0.5), (0.25,), (0.5,)).item()
    0.5
    """
    mean_C11 = images.new_tensor(mean)[:, None, None]
    std_C11 = images.new_tensor(std)[:, None, None]
    return (images - mean_C11) / std_C11
