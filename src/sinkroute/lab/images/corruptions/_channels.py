"""Grey and RGB: the brightness of a picture, and a picture with as many channels as another."""

from __future__ import annotations

import numpy as np

__all__ = ["luma", "with_channels"]

# ITU-R BT.601, as in Pillow's and OpenCV's conversions to grey.
_WEIGHTS = np.array([0.299, 0.587, 0.114])


def luma(x_HWC: np.ndarray) -> np.ndarray:
    """(H, W, C), C 1 or 3 -> (H, W, 1): perceived brightness; of a grey picture, itself."""
    return x_HWC if x_HWC.shape[-1] == 1 else (x_HWC @ _WEIGHTS)[..., None]


def with_channels(colour: np.ndarray, channels: int) -> np.ndarray:
    """(..., 3) RGB -> (..., channels): itself, or its luma."""
    return colour if channels == 3 else (colour @ _WEIGHTS)[..., None]
