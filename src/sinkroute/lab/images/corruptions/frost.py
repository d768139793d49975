"""Frost: a picture seen through an icy pane.

The published images use five photographs of frost, which are not ours to ship. Without them a texture is made up that
has their statistics: level, contrast, tint and spectrum. `folder` takes photographs instead, such as those of the
published script (https://github.com/hendrycks/robustness, ImageNet-C/create_c).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from sinkroute.lab.images.corruptions._channels import with_channels

__all__ = ["frost"]


def frost(
    x_HWC: np.ndarray,
    generator: np.random.Generator,
    kept: float,
    ice: float,
    scale: float,
    *,
    folder: str | Path | None = None,
) -> np.ndarray:
    """Mix the picture with ice: kept * x + ice * texture.

    Args:
        kept: factor of the picture.
        ice: factor of the ice.
        scale: factor of the size of photographs.
        folder: photographs of frost (PNG or JPEG files), of which one is drawn and cropped at random. None: made up.

    Raises:
        ValueError: there is no PNG or JPEG file in `folder`.
    """
    height, width, channels = x_HWC.shape
    if folder is None:
        texture = _made_up(generator, height, width)
    else:
        files = _photographs(Path(folder))
        photograph = _load(files[generator.integers(len(files))], scale, height, width)
        top = generator.integers(photograph.shape[0] - height + 1)
        left = generator.integers(photograph.shape[1] - width + 1)
        texture = photograph[top : top + height, left : left + width]
    return kept * x_HWC + ice * with_channels(texture, channels)


def _made_up(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3): grains and veins of ice, of the photographs' mean level, contrast and blue tint."""
    grains = _coloured_noise(generator, height, width, slope=1.4)
    veins = -np.abs(_coloured_noise(generator, height, width, slope=2.4))
    field = grains + veins
    field = (field - field.mean()) / field.std()
    # Ranges over 224 x 224 crops of the photographs.
    level = generator.uniform(0.45, 0.8)
    contrast = generator.uniform(0.06, 0.15)
    tint = generator.uniform(0.02, 0.16)
    return np.clip(level + contrast * field[..., None] + tint * np.array([-0.6, 0.1, 0.5]), 0, 1)


def _coloured_noise(generator: np.random.Generator, height: int, width: int, slope: float) -> np.ndarray:
    """(H, W) normal noise of variance 1 whose power falls as frequency ** -slope."""
    spectrum = np.fft.rfft2(generator.normal(size=(height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(spectrum * frequency ** (-slope / 2), s=(height, width))
    return noise / noise.std()


def _photographs(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in {".png", ".jpg", ".jpeg"})
    if not files:
        raise ValueError(
            f"folder: expected photographs of frost (PNG or JPEG), found none in {str(folder)!r}; without `folder` a "
            "texture is made up"
        )
    return files


@lru_cache(maxsize=16)
def _load(file: Path, scale: float, height: int, width: int) -> np.ndarray:
    """(h, w, 3) in [0, 1], scaled, and enlarged where it is smaller than (height, width)."""
    from PIL import Image

    with Image.open(file) as photograph:
        size = photograph.size
        factor = max(scale, width / size[0], height / size[1])
        resized = photograph.convert("RGB").resize(
            (max(width, round(size[0] * factor)), max(height, round(size[1] * factor))), Image.Resampling.BICUBIC
        )
    return np.asarray(resized) / 255
