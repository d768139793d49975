"""Brightness, contrast and saturation."""

from __future__ import annotations

import numpy as np

__all__ = ["brightness", "contrast", "saturate"]


def brightness(x_HWC: np.ndarray, generator: np.random.Generator, amount: float) -> np.ndarray:
    """Add `amount` to the value of hue, saturation and value; hue and saturation stay."""
    value = x_HWC.max(axis=-1, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    # Scaling all channels changes the value alone; black has no hue to keep.
    scaled = x_HWC * brighter / np.where(value > 0, value, 1)
    return np.where(value > 0, scaled, brighter)


def contrast(x_HWC: np.ndarray, generator: np.random.Generator, factor: float) -> np.ndarray:
    """Multiply the distance to the mean, that of each channel over the picture, by `factor`."""
    mean = x_HWC.mean(axis=(0, 1), keepdims=True)
    return (x_HWC - mean) * factor + mean


def saturate(x_HWC: np.ndarray, generator: np.random.Generator, factor: float, offset: float) -> np.ndarray:
    """Saturation times `factor` plus `offset`; hue and value stay.

    A grey pixel of an RGB picture has hue 0, which is red, and turns towards red where `offset` is not 0: as in the
    published images. A picture of one channel has no saturation and stays as it is.
    """
    if x_HWC.shape[-1] == 1:
        return x_HWC
    value = x_HWC.max(axis=-1, keepdims=True)
    chroma = value - x_HWC.min(axis=-1, keepdims=True)
    saturation = chroma / np.where(value > 0, value, 1)
    wanted = np.clip(saturation * factor + offset, 0, 1)
    # How far each channel is below the largest, as a share of the furthest: what hue is.
    below = (value - x_HWC) / np.where(chroma > 0, chroma, 1)
    below = np.where(chroma > 0, below, [0.0, 1.0, 1.0])
    return value * (1 - below * wanted)
