"""Snow: blurred flakes on a picture that is whitened."""

from __future__ import annotations

import numpy as np

from sinkroute.lab.images.corruptions import _filters
from sinkroute.lab.images.corruptions._channels import luma

__all__ = ["snow"]


def snow(
    x_HWC: np.ndarray,
    generator: np.random.Generator,
    mean: float,
    spread: float,
    flake: float,
    threshold: float,
    radius: int,
    sigma: float,
    kept: float,
) -> np.ndarray:
    """Whiten the picture and add falling flakes, twice: as drawn, and turned by 180°.

    Args:
        mean: of the normal noise that flakes are cut from.
        spread: its standard deviation.
        flake: by how much the noise is enlarged.
        threshold: noise below is no flake.
        radius: of the flakes' motion blur, in pixels, at an angle drawn from -135° to -45°.
        sigma: likewise.
        kept: share of the original picture; the rest is whitened.
    """
    flakes = _filters.zoom_in(generator.normal(mean, spread, x_HWC.shape[:2]), flake)
    flakes[flakes < threshold] = 0
    flakes = np.floor(np.clip(flakes, 0, 1) * 255)
    flakes = _filters.directional_blur(flakes, radius, sigma, generator.uniform(-135, -45))
    flakes = np.rint(flakes)[..., None] / 255
    white = np.maximum(x_HWC, luma(x_HWC) * 1.5 + 0.5)
    return kept * x_HWC + (1 - kept) * white + flakes + flakes[::-1, ::-1]
