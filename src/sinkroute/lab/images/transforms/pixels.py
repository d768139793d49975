"""Between PIL images and uint8 tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["to_pil", "to_tensor"]


def to_tensor(image: Image.Image) -> Tensor:
    """A grey ("L") or colour ("RGB") image as a (C, H, W) uint8 tensor that shares no memory.

    >>> to_tensor(Image.new("RGB", (3, 2), (1, 2, 3)))[:, 0, 0].tolist()
    [1, 2, 3]
    """
    pixels = np.array(image, dtype=np.uint8)
    if pixels.ndim == 2:
        return torch.from_numpy(pixels)[None]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_pil(image_CHW: Tensor) -> Image.Image:
    """A (C, H, W) uint8 tensor of 1 or 3 channels as a PIL image.

    Raises:
        ValueError: another number of channels.
    """
    if len(image_CHW) not in (1, 3):
        raise ValueError(f"image: expected 1 or 3 channels, got {len(image_CHW)}")
    pixels = image_CHW[0] if len(image_CHW) == 1 else image_CHW.permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))
