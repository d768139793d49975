"""Spatter: drops of water, or of mud, on the lens."""

from __future__ import annotations

import numpy as np

from sinkroute.lab.images.corruptions import _filters
from sinkroute.lab.images.corruptions._channels import with_channels

__all__ = ["spatter"]

_WATER = np.array([175, 238, 238]) / 255
_MUD = np.array([63, 42, 20]) / 255


def spatter(
    x_HWC: np.ndarray,
    generator: np.random.Generator,
    mean: float,
    spread: float,
    drop: float,
    threshold: float,
    strength: float,
    mud: bool,
) -> np.ndarray:
    """Cover the picture with drops: water brightens it, mud hides it.

    Args:
        mean: of the normal noise that drops are cut from.
        spread: its standard deviation.
        drop: sigma of the noise's blur, in pixels.
        threshold: blurred noise below is no drop.
        strength: of water, the largest addition; of mud, sigma in pixels of the blur of a drop's edge.
        mud: whether it is mud.
    """
    channels = x_HWC.shape[-1]
    liquid = _filters.gaussian_filter(generator.normal(mean, spread, x_HWC.shape[:2]), drop)
    liquid[liquid < threshold] = 0
    if mud:
        cover = _filters.gaussian_filter((liquid > threshold).astype(float), strength)[..., None]
        cover[cover < 0.8] = 0
        return x_HWC * (1 - cover) + with_channels(_MUD, channels) * cover
    liquid = np.floor(liquid * 255)
    shine = liquid * _relief(liquid)
    if not shine.any():
        return x_HWC
    return x_HWC + with_channels(_WATER, channels) * (shine * strength / shine.max())[..., None]


def _relief(liquid_HW: np.ndarray) -> np.ndarray:
    """How light falls on drops: (H, W) whole numbers from 0 to 255.

    The distance to the drops' edges, up to 20 pixels, with its histogram equalised and embossed from the upper left.
    """
    from scipy import ndimage

    edges = _edges(liquid_HW, 50, 150)
    if not edges.any():
        return np.zeros_like(liquid_HW)
    distance = np.minimum(_distance(edges), 20)
    relief = _equalised(np.floor(ndimage.uniform_filter(distance, 3, mode="mirror") + 1e-6).astype(np.uint8))
    embossed = ndimage.correlate(relief, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), mode="mirror")
    return np.rint(ndimage.uniform_filter(np.clip(embossed, 0, 255), 3, mode="mirror"))


def _distance(edges_HW: np.ndarray) -> np.ndarray:
    """From each pixel to the nearest edge, in steps of a king and a knight that are nearly as long as Euclid's.

    The steps of OpenCV's distance of precision 5, which the published script uses: what follows equalises a histogram,
    and so enlarges small differences.
    """
    from scipy import ndimage

    nearest = ndimage.distance_transform_edt(~edges_HW, return_distances=False, return_indices=True)
    away = np.abs(nearest - np.indices(edges_HW.shape))
    long, short = away.max(axis=0), away.min(axis=0)
    knight, diagonal = 2.1969, 1.4
    return np.where(
        2 * short <= long,
        short * knight + (long - 2 * short),
        (long - short) * knight + (2 * short - long) * diagonal,
    )


def _equalised(values: np.ndarray) -> np.ndarray:
    """uint8 -> float64: spread so that equal ranges hold equally many; the smallest becomes 0, the largest 255."""
    counts = np.bincount(values.ravel(), minlength=256)
    above_smallest = np.cumsum(counts) - counts[values.min()]
    if above_smallest[-1] == 0:
        return values.astype(float)
    return np.rint(np.maximum(above_smallest, 0) * (255 / above_smallest[-1]))[values]


def _edges(picture_HW: np.ndarray, low: float, high: float) -> np.ndarray:
    """Canny's edges, (H, W) bool: ridges of |dx| + |dy| above `low`, connected to one above `high`."""
    from scipy import ndimage

    across = ndimage.sobel(picture_HW, axis=1, mode="nearest")
    down = ndimage.sobel(picture_HW, axis=0, mode="nearest")
    strength = np.abs(across) + np.abs(down)
    height, width = strength.shape
    padded = np.pad(strength, 1)

    def neighbour(rows: int, columns: int) -> np.ndarray:
        return padded[1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    flat = np.abs(down) < np.tan(np.pi / 8) * np.abs(across)
    steep = np.abs(down) > np.tan(3 * np.pi / 8) * np.abs(across)
    falling = across * down >= 0
    # Of two equals in a row or a column the first is the ridge; on a diagonal neither is.
    on_ridge = np.select(
        [flat, steep, falling],
        [
            (strength > neighbour(0, -1)) & (strength >= neighbour(0, 1)),
            (strength > neighbour(-1, 0)) & (strength >= neighbour(1, 0)),
            (strength > neighbour(-1, -1)) & (strength > neighbour(1, 1)),
        ],
        (strength > neighbour(-1, 1)) & (strength > neighbour(1, -1)),
    )
    candidates = on_ridge & (strength > low)
    labels, _ = ndimage.label(candidates, structure=np.ones((3, 3)))
    strong = np.unique(labels[candidates & (strength > high)])
    return np.isin(labels, strong[strong > 0])
