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
    """(H, W, 3) in [0, 1]: needles of ice."""
    needles = _needles(generator, height, width)
    # As 224 x 224 crops of the five photographs: their luma has means of 0.42 to 0.83 and deviations of 0.06 to 0.15.
    level = generator.uniform(0.42, 0.83)
    contrast = generator.uniform(0.06, 0.15)
    blue = generator.uniform(0, 0.25)
    return np.clip(level + contrast * needles[..., None] + blue * np.array([-0.6, 0.2, 0.5]), 0, 1)


def _needles(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W) of mean 0 and deviation 1: in each pixel the largest of six fields of streaks in random directions.

    A field is normal noise of which a narrow range of directions is kept, with a power that falls with the frequency;
    that of the whole falls as about frequency ** -1.6, as the photographs' does.
    """
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf
    direction = np.arctan2(down, across)
    fields = []
    for angle in generator.uniform(0, np.pi, 6):
        spectrum = np.fft.rfft2(generator.normal(size=(height, width)))
        field = np.fft.irfft2(spectrum * np.cos(direction - angle) ** 24 / frequency, s=(height, width))
        fields.append(field / field.std())
    needles = np.max(fields, axis=0)
    return (needles - needles.mean()) / needles.std()


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
