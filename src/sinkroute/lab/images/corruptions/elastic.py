"""Elastic transform: a random affine map of the picture, then a smooth random displacement of every pixel."""

from __future__ import annotations

import numpy as np

__all__ = ["elastic_transform"]


def elastic_transform(
    x_HWC: np.ndarray, generator: np.random.Generator, amplitude: float, smoothness: float, skew: float
) -> np.ndarray:
    """Move three points at random and the picture with them, then displace every pixel, bilinearly.

    All lengths are shares of the picture's shorter side, as in the published scripts (whose 244 for ImageNet-C, where
    224 was meant, is kept: at 224 pixels the lengths are theirs).

    Args:
        amplitude: factor of the displacements, which are of [-1, 1] before they are smoothed.
        smoothness: sigma of the normal blur of the displacements, cut at 3 sigma.
        skew: the three points move by up to this, in rows and in columns.
    """
    from scipy import ndimage

    height, width, channels = x_HWC.shape
    side = min(height, width)
    outwards, inwards = _affine(generator, height, width, skew * side)
    x_HWC = np.stack(
        [
            ndimage.affine_transform(x_HWC[..., channel], outwards, inwards, order=1, mode="mirror")
            for channel in range(channels)
        ],
        axis=-1,
    )
    columns, rows = (
        ndimage.gaussian_filter(
            generator.uniform(-1, 1, (height, width)), smoothness * side, mode="reflect", truncate=3.0
        )
        * (amplitude * side)
        for _ in range(2)
    )
    positions = np.stack([np.arange(height)[:, None] + rows, np.arange(width) + columns])
    return np.stack(
        [
            ndimage.map_coordinates(x_HWC[..., channel], positions, order=1, mode="reflect")
            for channel in range(channels)
        ],
        axis=-1,
    )


def _affine(generator: np.random.Generator, height: int, width: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """From a (row, column) of the moved picture to one of the original: a (2, 2) matrix and a (2,) offset."""
    column, row, arm = width // 2, height // 2, min(height, width) // 3
    corners = np.array([[column + arm, row + arm], [column + arm, row - arm], [column - arm, row - arm]], dtype=float)
    moved = corners + generator.uniform(-reach, reach, size=corners.shape)
    # [column, row, 1] of each moved corner, times this, is the corner's [column, row].
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)
    return back[:2, :2].T[::-1, ::-1], back[2, ::-1]
