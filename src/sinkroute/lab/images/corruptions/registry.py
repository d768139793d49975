"""The corruptions by name, the published constants of their severities, and the one entrance that runs them.

Constants: https://github.com/hendrycks/robustness, `ImageNet-C/create_c/make_{imagenet,tinyimagenet,cifar}_c.py`.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from sinkroute._errors import require_count, unknown_name
from sinkroute.lab.images.corruptions.blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from sinkroute.lab.images.corruptions.colour import brightness, contrast, saturate
from sinkroute.lab.images.corruptions.digital import jpeg_compression, pixelate
from sinkroute.lab.images.corruptions.elastic import elastic_transform
from sinkroute.lab.images.corruptions.fog import fog
from sinkroute.lab.images.corruptions.frost import frost
from sinkroute.lab.images.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from sinkroute.lab.images.corruptions.snow import snow
from sinkroute.lab.images.corruptions.spatter import spatter

__all__ = ["CORRUPTIONS", "Corruption", "corrupt", "list_corruptions"]

Images = TypeVar("Images", np.ndarray, Tensor)


@dataclass(frozen=True)
class Corruption:
    """A corruption, and the parameters of severities 1 to 5 for three sizes of images.

    Attributes:
        apply: (x_HWC float64 in [0, 1], generator, *parameters, **options) -> (H, W, C); what leaves [0, 1] is
            clipped. Its keyword-only arguments are its options.
        large: parameters from 97 pixels on, published for ImageNet-C's 224.
        middle: from 49 to 96 pixels, published for Tiny ImageNet-C's 64.
        small: up to 48 pixels, published for CIFAR-10-C's 32.
        extra: whether it is one of the four outside the benchmark.
    """

    apply: Callable[..., np.ndarray]
    large: tuple[Any, ...]
    middle: tuple[Any, ...]
    small: tuple[Any, ...]
    extra: bool = False

    def parameters(self, side: int, severity: int) -> tuple[Any, ...]:
        """For images whose shorter side is of `side` pixels."""
        table = self.small if side <= 48 else self.middle if side <= 96 else self.large
        found = table[severity - 1]
        return found if isinstance(found, tuple) else (found,)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        gaussian_noise,
        large=(0.08, 0.12, 0.18, 0.26, 0.38),
        middle=(0.04, 0.08, 0.12, 0.15, 0.18),
        small=(0.04, 0.06, 0.08, 0.09, 0.10),
    ),
    "shot_noise": Corruption(
        shot_noise,
        large=(60, 25, 12, 5, 3),
        middle=(250, 100, 50, 30, 15),
        small=(500, 250, 100, 75, 50),
    ),
    "impulse_noise": Corruption(
        impulse_noise,
        large=(0.03, 0.06, 0.09, 0.17, 0.27),
        middle=(0.01, 0.02, 0.05, 0.08, 0.14),
        small=(0.01, 0.02, 0.03, 0.05, 0.07),
    ),
    "defocus_blur": Corruption(
        defocus_blur,
        large=((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        middle=((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        small=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": Corruption(
        glass_blur,
        large=((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        middle=((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        small=((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": Corruption(
        motion_blur,
        large=((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        middle=((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        small=((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom_blur": Corruption(
        zoom_blur,
        large=((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        middle=((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        small=((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "snow": Corruption(
        snow,
        large=(
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        middle=(
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        small=(
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(
        frost,
        large=((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
        middle=((1, 0.3, 0.3), (0.9, 0.4, 0.3), (0.8, 0.45, 0.3), (0.75, 0.5, 0.3), (0.7, 0.55, 0.3)),
        small=((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
    ),
    "fog": Corruption(
        fog,
        large=((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        middle=((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        small=((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": Corruption(
        brightness,
        large=(0.1, 0.2, 0.3, 0.4, 0.5),
        middle=(0.1, 0.2, 0.3, 0.4, 0.5),
        small=(0.05, 0.1, 0.15, 0.2, 0.3),
    ),
    "contrast": Corruption(
        contrast,
        large=(0.4, 0.3, 0.2, 0.1, 0.05),
        middle=(0.4, 0.3, 0.2, 0.1, 0.05),
        small=(0.75, 0.5, 0.4, 0.3, 0.15),
    ),
    "elastic_transform": Corruption(
        elastic_transform,
        large=tuple(
            (amplitude * 244 / 224, smoothness * 244 / 224, skew * 244 / 224)
            for amplitude, smoothness, skew in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
        middle=((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
        small=((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Corruption(
        pixelate,
        large=(0.6, 0.5, 0.4, 0.3, 0.25),
        middle=(0.9, 0.8, 0.7, 0.6, 0.5),
        small=(0.95, 0.9, 0.85, 0.75, 0.65),
    ),
    "jpeg_compression": Corruption(
        jpeg_compression,
        large=(25, 18, 15, 10, 7),
        middle=(65, 58, 50, 40, 25),
        small=(80, 65, 58, 50, 40),
    ),
    "speckle_noise": Corruption(
        speckle_noise,
        large=(0.15, 0.2, 0.35, 0.45, 0.6),
        middle=(0.15, 0.2, 0.25, 0.3, 0.35),
        small=(0.06, 0.1, 0.12, 0.16, 0.2),
        extra=True,
    ),
    "gaussian_blur": Corruption(
        gaussian_blur,
        large=(1, 2, 3, 4, 6),
        middle=(0.5, 0.75, 1, 1.25, 1.5),
        small=(0.4, 0.6, 0.7, 0.8, 1),
        extra=True,
    ),
    "spatter": Corruption(
        spatter,
        large=(
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
        middle=(
            (0.62, 0.1, 0.7, 0.7, 0.6, False),
            (0.65, 0.1, 0.8, 0.7, 0.6, False),
            (0.65, 0.3, 1, 0.69, 0.6, False),
            (0.65, 0.1, 0.7, 0.68, 0.6, True),
            (0.65, 0.1, 0.5, 0.67, 0.6, True),
        ),
        small=(
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
        extra=True,
    ),
    "saturate": Corruption(
        saturate,
        large=((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        middle=((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
        small=((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        extra=True,
    ),
}
"""Name -> corruption, in the published order: noise, blur, weather, digital, extra."""


def list_corruptions(extra: bool = False) -> list[str]:
    """The 15 names that make the benchmark, in the published order; with `extra`, then the 4 others.

    >>> list_corruptions()[:3], len(list_corruptions()), len(list_corruptions(extra=True))
    (['gaussian_noise', 'shot_noise', 'impulse_noise'], 15, 19)
    """
    return [name for name, corruption in CORRUPTIONS.items() if extra or not corruption.extra]


def corrupt(name: str, images: Images, severity: int, seed: int, *, first_index: int = 0, **options: Any) -> Images:
    """Corrupt images.

    An image's random draws are keyed by (seed, name, severity, its index) alone: not by the batch that it is in.

    The published parameters come in three tables, and the shorter side of the images chooses: CIFAR-10-C's up to 48
    pixels, Tiny ImageNet-C's up to 96, ImageNet-C's above. Lengths in pixels are taken as they stand there; only those
    of "elastic_transform" are shares of the side. In grey images a colour (of frost, of drops) is its luma; "saturate"
    leaves them as they are.

    Args:
        name: One of `list_corruptions(extra=True)`.
        images: (B, C, H, W) uint8 tensor, or one image as a (H, W, C) uint8 array; C 1 or 3, H and W at least 8. Not
            changed.
        severity: 1 to 5.
        seed: At least 0.
        first_index: Index of the first image; those after it follow. At least 0.
        options: The corruption's own; "frost" takes `folder`, photographs of frost in place of a made-up texture.

    Returns:
        uint8 of the same kind, shape and device; fractions are cut off, as in the published images.

    Raises:
        ValueError: `name` or an option's name is unknown, `severity`, `seed` or `first_index` is out of range, the
            shape is another, or there are no photographs in `folder`.
        TypeError: `images` is neither a tensor nor an array, or not uint8.

    >>> black = np.zeros((8, 8, 1), dtype=np.uint8)
    >>> corrupt("brightness", black, severity=5, seed=0)[0, 0]  # 0.3 of 255
    array([76], dtype=uint8)
    """
    if name not in CORRUPTIONS:
        raise unknown_name("corruption", name, CORRUPTIONS)
    corruption = CORRUPTIONS[name]
    known = [
        parameter.name
        for parameter in inspect.signature(corruption.apply).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in known:
            raise unknown_name(f"{name} option", option, known)
    require_count("severity", severity, 1, 5)
    require_count("seed", seed, 0)
    require_count("first_index", first_index, 0)

    def one(image_HWC: np.ndarray, index: int) -> np.ndarray:
        generator = np.random.default_rng([seed, zlib.crc32(name.encode()), severity, index])
        parameters = corruption.parameters(min(image_HWC.shape[:2]), severity)
        corrupted = corruption.apply(image_HWC / 255, generator, *parameters, **options)
        # A whole number that rounding put a hair below itself stays that number.
        return (np.clip(corrupted, 0, 1) * 255 + 1e-6).astype(np.uint8)

    if isinstance(images, np.ndarray):
        _require_images("(H, W, C)", images.shape, images.dtype == np.uint8, images.dtype, (2, 0, 1))
        return one(images, first_index)
    import torch

    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a uint8 tensor or array, got {type(images).__name__}")
    _require_images("(B, C, H, W)", tuple(images.shape), images.dtype == torch.uint8, images.dtype, (1, 2, 3))
    corrupted = torch.empty_like(images, device="cpu")
    for row, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        corrupted[row] = torch.from_numpy(one(image, first_index + row)).permute(2, 0, 1)
    return corrupted.to(images.device)


def _require_images(
    expected: str, shape: tuple[int, ...], is_uint8: bool, dtype: object, places: tuple[int, int, int]
) -> None:
    """`places` says where in `shape` the channels, the rows and the columns are."""
    if not is_uint8:
        raise TypeError(f"images: expected uint8 values from 0 to 255, got {dtype}")
    if len(shape) != len(expected.split(",")):
        raise ValueError(f"images: expected shape {expected}, got {shape}")
    channels, height, width = (shape[place] for place in places)
    if channels not in (1, 3) or min(height, width) < 8:
        raise ValueError(f"images: expected {expected} with C 1 or 3 and H and W of 8 or more, got {shape}")
