"""What files and screens do: fewer pixels, and JPEG."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["jpeg_compression", "pixelate"]


def pixelate(x_HWC: np.ndarray, generator: np.random.Generator, share: float) -> np.ndarray:
    """Shrink both sides to `share`, and enlarge again, each by averages over boxes."""
    from PIL import Image

    height, width = x_HWC.shape[:2]
    picture = _to_picture(x_HWC)
    small = picture.resize((int(width * share), int(height * share)), Image.Resampling.BOX)
    return _from_picture(small.resize((width, height), Image.Resampling.BOX), x_HWC)


def jpeg_compression(x_HWC: np.ndarray, generator: np.random.Generator, quality: int) -> np.ndarray:
    """Compress as JPEG of a `quality` from 1 to 95, by Pillow's own encoder, and decode."""
    from PIL import Image

    file = BytesIO()
    _to_picture(x_HWC).save(file, "JPEG", quality=quality)
    return _from_picture(Image.open(file), x_HWC)


def _to_picture(x_HWC: np.ndarray) -> Image.Image:
    from PIL import Image

    values = np.rint(x_HWC * 255).astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def _from_picture(picture: Image.Image, x_HWC: np.ndarray) -> np.ndarray:
    return np.asarray(picture).reshape(x_HWC.shape) / 255
