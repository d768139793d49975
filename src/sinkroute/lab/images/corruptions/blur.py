"""Blur: out of focus, through frosted glass, by motion, by zooming, and the plain normal one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sinkroute.lab.images.corruptions import _filters

__all__ = ["defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur"]


def gaussian_blur(x_HWC: np.ndarray, generator: np.random.Generator, sigma: float) -> np.ndarray:
    """Normal blur; `sigma` in pixels."""
    return _filters.gaussian_filter(x_HWC, sigma)


def defocus_blur(x_HWC: np.ndarray, generator: np.random.Generator, radius: float, softness: float) -> np.ndarray:
    """Average over a disc, as a lens out of focus does; the picture is mirrored at its border.

    Args:
        radius: of the disc, in pixels.
        softness: sigma of the blur of the disc's own edge, in pixels.
    """
    kernel = _disc(radius, softness)
    reach = len(kernel) // 2
    padded = np.pad(x_HWC, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    # By Fourier transform: a disc of radius 10 has 317 pixels.
    size = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, s=size)[..., None]
    return np.fft.irfft2(spectrum, s=size, axes=(0, 1))[2 * reach :, 2 * reach :]


@lru_cache(maxsize=16)
def _disc(radius: float, softness: float) -> np.ndarray:
    """A square kernel of odd side without an empty border.

    The disc's edge is blurred by 3 taps up to a radius of 8 and by 5 above. At the radii 8 and 10 the disc touches the
    square that it is blurred in, the blur mirrors it there, and the sum is a little more than 1: so it was published.
    """
    from scipy import ndimage

    reach = max(8, int(np.ceil(radius)))
    offsets = np.arange(-reach, reach + 1)
    disc = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(float)
    disc /= disc.sum()
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    weights = np.exp(-(taps**2) / (2 * softness**2))
    weights /= weights.sum()
    for axis in (0, 1):
        disc = ndimage.correlate1d(disc, weights, axis=axis, mode="mirror")
    used = np.abs(offsets[disc.any(axis=0)]).max()
    return disc[reach - used : reach + used + 1, reach - used : reach + used + 1]


def glass_blur(x_HWC: np.ndarray, generator: np.random.Generator, sigma: float, reach: int, rounds: int) -> np.ndarray:
    """Blur, displace pixels at random, blur again.

    From the last pixel to the first, a pixel takes the value of one up to `reach` pixels away. The published script
    means to swap the two, but its swap of NumPy views copies in one direction only; so do the published images, and so
    does this.

    Args:
        sigma: of the normal blur before and after, in pixels.
        reach: displacements are from -reach to reach - 1, in rows and in columns.
        rounds: how many times the pixels are displaced.
    """
    height, width, channels = x_HWC.shape
    blurred = np.floor(_filters.gaussian_filter(x_HWC, sigma) * 255 + 1e-6) / 255
    pixels = blurred.reshape(-1, channels)
    for _ in range(rounds):
        pixels = pixels[_displaced(generator, height, width, reach)]
    return _filters.gaussian_filter(pixels.reshape(x_HWC.shape), sigma)


def _displaced(generator: np.random.Generator, height: int, width: int, reach: int) -> np.ndarray:
    """For each pixel, numbered by rows: the pixel whose value it has after one round."""
    rows = np.arange(height - reach, reach, -1)[:, None]
    columns = np.arange(width - reach, reach, -1)
    shifts = generator.integers(-reach, reach, size=(len(rows), len(columns), 2))
    source = np.arange(height * width)
    source[rows * width + columns] = (rows + shifts[..., 1]) * width + columns + shifts[..., 0]

    # Pixels are visited from the last to the first: a source further back has taken its own source's value before, so
    # the chain is followed until it leads forward, or to a pixel of the border, which keeps its value.
    pixel, origin = np.arange(height * width), source.copy()
    while True:
        goes_on = np.flatnonzero(origin > pixel)
        if not len(goes_on):
            return origin
        pixel[goes_on] = origin[goes_on]
        origin[goes_on] = source[origin[goes_on]]


def motion_blur(x_HWC: np.ndarray, generator: np.random.Generator, radius: int, sigma: float) -> np.ndarray:
    """Smear to one side, at an angle drawn from -45° to 45°; `radius` and `sigma` in pixels."""
    return _filters.directional_blur(x_HWC, radius, sigma, generator.uniform(-45, 45))


def zoom_blur(x_HWC: np.ndarray, generator: np.random.Generator, stop: float, step: float) -> np.ndarray:
    """Mean of the picture and of the picture enlarged by the factors 1, 1 + step, ... below `stop`.

    The factors are NumPy's `arange(1, stop, step)`, which may, by rounding, hold `stop`: so do the published images.
    """
    factors = np.arange(1, stop, step).tolist()
    return (x_HWC + sum(_filters.zoom_in(x_HWC, factor) for factor in factors)) / (len(factors) + 1)
