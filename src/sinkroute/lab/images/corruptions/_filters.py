"""Linear filters that several corruptions share, with the borders of the published scripts."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["directional_blur", "gaussian_filter", "zoom_in"]


def gaussian_filter(x: np.ndarray, sigma: float) -> np.ndarray:
    """Normal blur of (H, W) or (H, W, C) over H and W, cut at 4 sigma; the border's values go on outside."""
    from scipy import ndimage

    return ndimage.gaussian_filter(x, (sigma, sigma, 0)[: x.ndim], mode="nearest", truncate=4.0)


def directional_blur(x: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """Smear (H, W) or (H, W, C) along a ray, to one side only, as ImageMagick's motion blur does.

    Tap k of 0 to 2 * radius weighs exp(-k² / (2 sigma²)), normalised, and reads the pixel nearest to k steps along the
    ray; the border's values go on outside.

    Args:
        radius: in pixels.
        sigma: in pixels.
        angle: of the ray, in degrees from the direction of growing columns to that of growing rows.
    """
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights /= weights.sum()
    rows = np.ceil(taps * np.sin(np.deg2rad(angle)) - 0.5).astype(int)
    columns = np.ceil(taps * np.cos(np.deg2rad(angle)) - 0.5).astype(int)

    height, width = x.shape[:2]
    top, left = -rows.min(), -columns.min()
    border = [(top, rows.max()), (left, columns.max())] + [(0, 0)] * (x.ndim - 2)
    padded = np.pad(x, border, mode="edge")
    blurred = np.zeros_like(x)
    for weight, row, column in zip(weights, rows + top, columns + left, strict=True):
        blurred += weight * padded[row : row + height, column : column + width]
    return blurred


def zoom_in(x: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge the middle of (H, W) or (H, W, C) by `factor` of at least 1, bilinearly; the shape stays."""
    rows, row_shares = _zoom_positions(x.shape[0], factor)
    columns, column_shares = _zoom_positions(x.shape[1], factor)
    trailing = (1,) * (x.ndim - 2)
    share = row_shares.reshape(-1, 1, *trailing)
    x = x[rows] * (1 - share) + x[rows + 1] * share
    share = column_shares.reshape(-1, *trailing)
    return x[:, columns] * (1 - share) + x[:, columns + 1] * share


@lru_cache(maxsize=256)
def _zoom_positions(side: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """For each of `side` pixels of the enlarged picture: the pixel before it in the original, and how far behind."""
    cropped = int(np.ceil(side / factor))
    first = (side - cropped) // 2
    # The first and last pixels of the crop are those of the enlarged picture, of which the middle is kept.
    enlarged = round(cropped * factor)
    kept = np.arange(side) + (enlarged - side) // 2
    position = kept * (cropped - 1) / (enlarged - 1)
    before = np.clip(np.floor(position).astype(int), 0, cropped - 2)
    return first + before, position - before
