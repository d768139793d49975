"""Noise of single values: thermal, photon, dead-pixel and multiplicative. Every channel draws for itself."""

from __future__ import annotations

import numpy as np

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]


def gaussian_noise(x_HWC: np.ndarray, generator: np.random.Generator, sigma: float) -> np.ndarray:
    """Add normal noise of standard deviation `sigma`."""
    return x_HWC + generator.normal(scale=sigma, size=x_HWC.shape)


def shot_noise(x_HWC: np.ndarray, generator: np.random.Generator, photons: float) -> np.ndarray:
    """Count photons: a Poisson draw of mean x * photons, as a share of `photons`."""
    return generator.poisson(x_HWC * photons) / photons


def impulse_noise(x_HWC: np.ndarray, generator: np.random.Generator, share: float) -> np.ndarray:
    """Salt and pepper: a value becomes 0 or 1, each with probability share / 2."""
    hit = generator.random(x_HWC.shape) < share
    salt = generator.random(x_HWC.shape) < 0.5
    return np.where(hit, salt, x_HWC)


def speckle_noise(x_HWC: np.ndarray, generator: np.random.Generator, sigma: float) -> np.ndarray:
    """Add normal noise in proportion to the value: x + x * normal(0, sigma)."""
    return x_HWC + x_HWC * generator.normal(scale=sigma, size=x_HWC.shape)
