"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) in the variant of the published recipes, "rand-m9-mstd0.5-inc1".

Each image gets two operations, drawn with replacement from 15, each done with probability 0.5. The magnitude of each is
drawn from N(9, 0.5) and clipped to [0, 10]. In this variant (timm's "inc1") no operation gets milder as the magnitude m
grows; with s = m / 10:

| operation | argument |
|---|---|
| AutoContrast, Equalize, Invert | none |
| Rotate | ±30° · s |
| Posterize | keeps 4 − ⌊4 s⌋ bits (none at m = 10: black) |
| Solarize | inverts pixels from 256 − ⌊256 s⌋ on |
| SolarizeAdd | adds ⌊110 s⌋ to pixels below 128 |
| Color, Contrast, Brightness, Sharpness | factor 1 ± 0.9 s |
| ShearX, ShearY | ±0.3 · s |
| TranslateX, TranslateY | ±0.45 · s of the side |

Signs are drawn with probability 0.5. Geometric operations resample bicubically, as DeiT's do, and fill what comes from
outside with the mean colour of the data set. A grey image stays grey, and Color does nothing to it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sinkroute.lab.images.policy import Policy

__all__ = ["OPERATIONS", "randaugment"]

_PROBABILITY = 0.5

Colour = tuple[int, ...]


def _affine(image: Image.Image, fill: Colour, coefficients: tuple[float, ...]) -> Image.Image:
    # A point (x, y) of the result comes from (a x + b y + c, d x + e y + f) of the image.
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def _rotate(image: Image.Image, signed: float, fill: Colour) -> Image.Image:
    return image.rotate(30 * signed, resample=Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, signed: float, fill: Colour) -> Image.Image:
    dropped = 4 + int(4 * abs(signed))
    return image.point([value >> dropped << dropped for value in range(256)] * len(image.getbands()))


def _solarize(image: Image.Image, signed: float, fill: Colour) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * abs(signed)))


def _solarize_add(image: Image.Image, signed: float, fill: Colour) -> Image.Image:
    added = int(110 * abs(signed))
    table = [min(value + added, 255) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(
    enhancer: Callable[[Image.Image], ImageEnhance._Enhance], image: Image.Image, signed: float
) -> Image.Image:
    return enhancer(image).enhance(1 + 0.9 * signed)


OPERATIONS: dict[str, Callable[[Image.Image, float, Colour], Image.Image]] = {
    "AutoContrast": lambda image, signed, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, signed, fill: ImageOps.equalize(image),
    "Invert": lambda image, signed, fill: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": lambda image, signed, fill: _enhance(ImageEnhance.Color, image, signed),
    "Contrast": lambda image, signed, fill: _enhance(ImageEnhance.Contrast, image, signed),
    "Brightness": lambda image, signed, fill: _enhance(ImageEnhance.Brightness, image, signed),
    "Sharpness": lambda image, signed, fill: _enhance(ImageEnhance.Sharpness, image, signed),
    "ShearX": lambda image, signed, fill: _affine(image, fill, (1, 0.3 * signed, 0, 0, 1, 0)),
    "ShearY": lambda image, signed, fill: _affine(image, fill, (1, 0, 0, 0.3 * signed, 1, 0)),
    "TranslateX": lambda image, signed, fill: _affine(image, fill, (1, 0, 0.45 * signed * image.width, 0, 1, 0)),
    "TranslateY": lambda image, signed, fill: _affine(image, fill, (1, 0, 0, 0, 1, 0.45 * signed * image.height)),
}
"""Name -> operation(image, ±magnitude / 10, fill): a grey ("L") or colour ("RGB") image of the same size."""

_NAMES = tuple(OPERATIONS)


def randaugment(image: Image.Image, policy: Policy, generator: np.random.Generator, fill: Colour) -> Image.Image:
    """`image` after the operations that `generator` draws.

    Args:
        image: grey ("L") or colour ("RGB").
        policy: as `parse_policy` reads it.
        generator: the source of operations, magnitudes and signs.
        fill: for each channel, the value from 0 to 255 of what comes from outside.

    Returns:
        An image of the same size and mode.
    """
    for operation in generator.integers(len(_NAMES), size=policy.ops):
        done = generator.random() < _PROBABILITY
        magnitude = min(max(generator.normal(policy.magnitude, policy.std), 0), 10)
        sign = 1 if generator.random() < 0.5 else -1
        if done:
            image = OPERATIONS[_NAMES[operation]](image, sign * magnitude / 10, fill)
    return image
