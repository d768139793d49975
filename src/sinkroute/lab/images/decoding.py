"""A file of an image as pixels, with an error that names the file where it cannot be read."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

__all__ = ["SUFFIXES", "decode"]

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp"})
"""What counts as an image in a folder or an archive, in lower case."""


def decode(content: bytes, where: str) -> Image.Image:
    """The pixels of a JPEG, PNG or WebP file, in colour ("RGB") whatever it is in (ImageNet has grey and CMYK files).

    Args:
        content: the whole file.
        where: what an error calls the file.

    Raises:
        ValueError: the file is no image, is cut short, or is damaged.

    >>> decode(b"<html>", "n01440764_10026.JPEG")
    Traceback (most recent call last):
    ValueError: n01440764_10026.JPEG is no image that can be read (...); get the file again
    """
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} is no image that can be read ({error}); get the file again") from error
