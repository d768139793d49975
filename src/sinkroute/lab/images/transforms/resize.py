"""Resizing with Pillow's antialiasing bicubic filter, and the central part that evaluation looks at."""

from __future__ import annotations

from PIL import Image

__all__ = ["center_crop", "central_part", "resize", "resize_short"]


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` with (width, height) = `size`, bicubic."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def resize_short(image: Image.Image, size: int) -> Image.Image:
    """`image` with its shorter side `size` pixels long and the longer one in proportion, rounded down.

    >>> resize_short(Image.new("L", (100, 50)), 20).size
    (40, 20)
    """
    width, height = image.size
    short = min(width, height)
    return resize(image, (size * width // short, size * height // short))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The `size` × `size` pixels in the middle.

    Raises:
        ValueError: a side of `image` is shorter than `size`.
    """
    width, height = image.size
    if min(width, height) < size:
        raise ValueError(f"size: cannot cut {size} × {size} pixels out of {width} × {height}; resize the image first")
    # Half a pixel goes to the even side, as in torchvision, with which published models were evaluated.
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def central_part(image: Image.Image, size: int, margin: bool = True) -> Image.Image:
    """What evaluation looks at: for 224 pixels, the shorter side is resized to 256, and the middle cut out.

    Args:
        image: of any size.
        size: rows and columns of the part; with a margin, `size` is 7/8 of the shorter side.
        margin: False: resize the shorter side to `size` itself, which leaves an image of that size as it is.
    """
    return center_crop(resize_short(image, size * 8 // 7 if margin else size), size)
