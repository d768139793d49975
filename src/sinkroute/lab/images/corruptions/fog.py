"""Fog: a random fractal height map, brightest where the fog is thickest."""

from __future__ import annotations

import numpy as np

__all__ = ["fog"]


def fog(x_HWC: np.ndarray, generator: np.random.Generator, density: float, smoothness: float) -> np.ndarray:
    """Add fog, then scale so that the brightest possible value is the brightest of the original.

    Args:
        density: factor of the height map, which is from 0 to 1.
        smoothness: by how much the map's roughness falls with each halving of the scale.
    """
    height, width = x_HWC.shape[:2]
    side = 1 << (max(height, width) - 1).bit_length()
    brightest = x_HWC.max()
    foggy = x_HWC + density * plasma(generator, side, smoothness)[:height, :width, None]
    return foggy * brightest / (brightest + density)


def plasma(generator: np.random.Generator, side: int, smoothness: float) -> np.ndarray:
    """A periodic height map by the diamond-square algorithm, scaled to [0, 1].

    Each step sets the middle of every square of known points, then of every diamond, to the mean of its four corners
    plus uniform noise. The noise spans ±roughness², where the roughness falls by the factor `smoothness`
    with every step, as in the published script.

    Args:
        side: a power of 2, at least 2.
        smoothness: at least 1.

    Returns:
        (side, side) float64.
    """
    heights = np.zeros((side, side))
    step, roughness = side, 100.0
    while step >= 2:
        half = step // 2

        def noisy(total: np.ndarray, roughness: float = roughness) -> np.ndarray:
            return total / 4 + roughness * generator.uniform(-roughness, roughness, total.shape)

        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = noisy(pairs + np.roll(pairs, -1, axis=1))

        middles = heights[half::step, half::step]
        above_and_below = middles + np.roll(middles, 1, axis=0)
        heights[::step, half::step] = noisy(above_and_below + corners + np.roll(corners, -1, axis=1))
        left_and_right = middles + np.roll(middles, 1, axis=1)
        heights[half::step, ::step] = noisy(left_and_right + corners + np.roll(corners, -1, axis=0))

        step, roughness = half, roughness / smoothness
    heights -= heights.min()
    return heights / heights.max()
